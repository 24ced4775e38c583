"""Sections of `benchmarks.parts` that are steps: GaLore, LoRA-Pro, AdamW and clipping on small tensors, AdaLoRA's bookkeeping."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, synchronize
from benchmarks.parts_rows import Row, Setting, compared

# --- GaLore --------------------------------------------------------------------------------------------------------------------------


def galore(setting: Setting) -> Iterator[Row]:
    """Every step of a whole refresh period (200; 20 in small), projection and AdamW, on the linear weights of one layer of a 350M model.

    The first step is listed by itself. fp32, rank 256; `worst` is the slowest step of the period.
    """
    from galore_torch import GaLoreAdamW

    from rankwise.galore import GaLore

    hidden, inner, rank, period = (256, 688, 64, 20) if setting.small else (1024, 2736, 256, setting.period)
    shapes = 4 * [(hidden, hidden)] + 2 * [(inner, hidden)] + [(hidden, inner)]
    weights = [setting.randn(*shape) * 0.02 for shape in shapes]
    pool = [[_gradient(setting, *shape) for shape in shapes] for _ in range(3)]

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(weight.clone()) for weight in weights]

    def group(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters, "rank": rank, "update_proj_gap": period, "scale": 0.25, "proj_type": "std"}]

    # the same steps first, with the same choices: exact SVD, the official order of eps and bias correction
    mine, theirs = fresh(), fresh()
    first = GaLore([{"params": mine, "rank": rank}], lr=1e-2, eps=1e-6, update_interval=period, method="svd", official=True)
    second = GaLoreAdamW(group(theirs), lr=1e-2, eps=1e-6, no_deprecation_warning=True)
    for number in range(3):
        for parameters, optimizer in ((mine, first), (theirs, second)):
            for parameter, gradient in zip(parameters, pool[number], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    moved = [compared(a.detach() - w, b.detach() - w) for a, b, w in zip(mine, theirs, weights, strict=True)]
    assert max(moved) < 1e-2, moved

    parameters = {name: fresh() for name in ("rankwise", "rankwise, all at once", "galore-torch")}
    options: dict[str, Any] = {"lr": 1e-2, "update_interval": period}
    optimizers: dict[str, Any] = {
        "rankwise": GaLore([{"params": parameters["rankwise"], "rank": rank}], stagger=True, **options),
        "rankwise, all at once": GaLore([{"params": parameters["rankwise, all at once"], "rank": rank}], **options),
        "galore-torch": GaLoreAdamW(group(parameters["galore-torch"]), lr=1e-2, no_deprecation_warning=True),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    begun: dict[str, float] = {}
    for number in range(period + 1):
        for name, optimizer in optimizers.items():
            for parameter, gradient in zip(parameters[name], pool[number % 3], strict=True):
                parameter.grad = gradient
            gc.collect()
            synchronize()
            begin = time.perf_counter()
            optimizer.step()
            synchronize()
            seconds = time.perf_counter() - begin
            if number:
                times[name].append(seconds)
            else:
                begun[name] = seconds
    for what, of, target in (
        ("mean step", statistics.fmean, "<= 0.8 (0.6 on a GPU)"),
        ("worst step", max, "<= 0.2"),
        ("plain step (median)", statistics.median, None),
    ):
        for name, seconds in times.items():
            yield {
                "section": "galore",
                "what": what,
                "contender": name,
                "ms": 1000 * of(seconds),
                "ratio": of(seconds) / of(times["galore-torch"]),
                "difference": max(moved) if name == "rankwise" and what == "mean step" else None,
                "target": target if name == "rankwise" else None,
            }
    for name, seconds in begun.items():
        yield {
            "section": "galore",
            "what": "first step",
            "contender": name,
            "ms": 1000 * seconds,
            "ratio": seconds / begun["galore-torch"],
            "difference": None,
            "target": None,
        }


def _gradient(setting: Setting, out: int, wide: int) -> Tensor:
    """Falling singular values and noise, as gradients of a batch have them."""
    inner = min(out, wide) // 4
    falling = torch.arange(1, inner + 1, device=setting.device).float().rsqrt()
    return (setting.randn(out, inner) * falling) @ setting.randn(inner, wide) * (1e-3 / inner**0.5) + 1e-4 * setting.randn(out, wide)


# --- LoRA-Pro ------------------------------------------------------------------------------------------------------------------------


def stack(setting: Setting, shapes: list[tuple[int, int]], recipe: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Linear layers side by side, adapted: only their factors matter here."""
    import rankwise as rw

    model = nn.ModuleDict({f"layer{i}": setting.linear(out, wide, dtype) for i, (out, wide) in enumerate(shapes)})
    return rw.adapt(model, recipe)


def fill(model: nn.Module, seed: int = 0) -> None:
    """The same small factors and gradients for every contender, by the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_pro(setting: Setting) -> Iterator[Row]:
    """A step on the factors (rank 16) of two layers of a 130M model: AdamW, LoRA-Pro by ours, and by the paper's formulas one by one."""
    import rankwise as rw

    hidden, inner, layers = (256, 688, 1) if setting.small else (768, 2048, 2)
    shapes = layers * (4 * [(hidden, hidden)] + 2 * [(inner, hidden)] + [(hidden, inner)])
    gradients: dict[str, list[Tensor]] = {}
    models: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}

    def add(name: str, recipe: Any, make: Callable[[Any], Any]) -> None:
        model = stack(setting, shapes, recipe)
        fill(model)
        optimizer = make(model)
        models[name], gradients[name] = model, [p.grad.clone() for p in trained(model) if p.grad is not None]

        def call() -> None:
            for parameter, gradient in zip(trained(model), gradients[name], strict=True):
                parameter.grad.copy_(gradient)  # type: ignore[union-attr]
            optimizer.step()

        calls[name] = call

    fields: dict[str, Any] = {"rank": 16, "targets": "all-linear", "lr": 1e-4}
    add("AdamW, default", rw.recipes.lora(**fields), lambda model: torch.optim.AdamW(trained(model), lr=1e-4))
    add("AdamW, fused", rw.recipes.lora(**fields), lambda model: torch.optim.AdamW(trained(model), lr=1e-4, fused=True))
    add("ours, factor space", rw.recipes.lora_pro(**fields), lambda model: rw.optimizer(model))
    for states in ("fp32", "8bit", "factored"):
        recipe = rw.recipes.lora_pro(adam_space="weight", states=states, cap=None, **fields)  # type: ignore[arg-type]
        add(f"ours, weight space, {states}", recipe, lambda model: rw.optimizer(model))
    add("official form", rw.recipes.lora(**fields), OfficialForm)
    for name in ("ours, weight space, fp32", "official form"):
        calls[name]()
    before = stack(setting, shapes, rw.recipes.lora(**fields))
    fill(before)
    steps = {
        name: torch.cat([(p.detach() - q.detach()).flatten() for p, q in zip(trained(models[name]), trained(before), strict=True)])
        for name in ("ours, weight space, fp32", "official form")
    }
    agreement = {"ours, weight space, fp32": compared(steps["ours, weight space, fp32"], steps["official form"])}
    assert agreement["ours, weight space, fp32"] < 1e-2, agreement
    times = interleave(calls, setting.repeats)
    yield from setting.rows("lora-pro", f"step, {len(shapes)} matrices, rank 16", times, "official form", agreement)


class OfficialForm:
    """Algorithm 2 of LoRA-Pro as its authors' code goes about it: matrix after matrix, whole, X by two general eigendecompositions."""

    def __init__(self, model: Any) -> None:
        from rankwise.sites import adapted_sites

        self.pairs = [(module.update, float(module.update.scaling)) for module in adapted_sites(model).values()]  # type: ignore[union-attr]
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float = 1e-4) -> None:
        self.steps += 1
        for update, s in self.pairs:
            a, b = update.down, update.up
            gram_a, gram_b = torch.linalg.pinv(a @ a.T), torch.linalg.pinv(b.T @ b)
            h_a = gram_b @ a.grad / s**2
            h_b = (b.grad - b @ (gram_b @ (b.T @ b.grad))) @ gram_a / s**2
            whole = s * (b @ h_a + h_b @ a)
            m, v = self.moments.setdefault(id(update), (torch.zeros_like(whole), torch.zeros_like(whole)))
            m.mul_(0.9).add_(whole, alpha=0.1)
            v.mul_(0.999).addcmul_(whole, whole, value=0.001)
            n = m / (1 - 0.9**self.steps) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            g_a, g_b = s * b.T @ n, s * n @ a.T
            x = _sylvester(b.T @ b, a @ a.T, -gram_b @ (g_a @ a.T) / s**2)
            a.sub_(gram_b @ g_a / s**2 + x @ a, alpha=lr)
            b.sub_((g_b - b @ (gram_b @ (b.T @ g_b))) @ gram_a / s**2 - b @ x, alpha=lr)


def _sylvester(left: Tensor, right: Tensor, target: Tensor) -> Tensor:
    values, u = torch.linalg.eig(left)
    others, v = torch.linalg.eig(-right)
    rotated = torch.linalg.solve(u, (target + 0j) @ v)
    return (u @ (rotated / (values[:, None] - others[None, :])) @ torch.linalg.inv(v)).real


# --- AdamW and clipping --------------------------------------------------------------------------------------------------------------


def clipping(setting: Setting) -> Iterator[Row]:
    """A step of AdamW and clipping to a norm of 1 on many small tensors, 2.1 million numbers together."""
    import rankwise as rw

    for sites, rank in [(12, 16)] if setting.small else [(84, 16), (224, 6)]:
        recipe = rw.recipes.lora(rank=rank, targets="all-linear")
        model = stack(setting, sites * [(768, 768)], recipe)
        fill(model)
        kinds: dict[str, Callable[[Any], Any]] = {
            "rankwise": lambda model: rw.optimizer(model, lr=1e-4),
            "AdamW, default": lambda model: torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0),
            "AdamW, foreach": lambda model: torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0, foreach=True),
            "AdamW, fused": lambda model: torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0, fused=True),
        }
        copies = {name: copy.deepcopy(model) for name in kinds}
        for each in copies.values():
            fill(each)
        count = sum(parameter.numel() for parameter in trained(model))
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained(model)]))
        flat.grad = torch.cat([p.grad.flatten() for p in trained(model) if p.grad is not None])
        optimizers = {name: make(copies[name]) for name, make in kinds.items()}
        calls: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
        calls["one flat tensor, fused"] = torch.optim.AdamW([flat], lr=1e-4, weight_decay=0.0, fused=True).step
        for call in calls.values():
            call()
        ends = {name: torch.cat([p.detach().flatten() for p in trained(each)]) for name, each in copies.items()}
        ends["one flat tensor, fused"] = flat.detach()
        start = torch.cat([p.detach().flatten() for p in _filled(model)])
        agreement = {name: compared(end - start, ends["AdamW, default"] - start) for name, end in ends.items()}
        assert max(agreement.values()) < 1e-2, agreement  # of steps of 1e-4 on numbers of 0.05, fp32
        what = f"AdamW step, {2 * sites} tensors, {count / 1e6:.1f} M numbers"
        yield from setting.rows("clipping", what, interleave(calls, setting.repeats), "AdamW, default", agreement)

        parameters = trained(model)
        for bound in (1e-3, 1e9):
            fill(model)
            clips: dict[str, Callable[[], Any]] = {
                "one pass, a second if above": lambda bound=bound, parameters=parameters: _one_pass(parameters, bound),
                "torch": lambda bound=bound, parameters=parameters: torch.nn.utils.clip_grad_norm_(parameters, bound),
                "one flat tensor": lambda bound=bound, flat=flat: torch.nn.utils.clip_grad_norm_([flat], bound),
            }
            found = {}
            for name, clip in clips.items():
                fill(model)
                flat.grad = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                norm = clip()
                after = flat.grad if "flat" in name else torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                found[name] = torch.cat([after, norm.reshape(1)])
            agreement = {name: compared(each, found["torch"]) for name, each in found.items()}
            assert max(agreement.values()) < 1e-4, agreement  # one sum over 2 million squares in fp32 is that far off
            fill(model)
            what = f"clipping, {2 * sites} tensors, {'above' if bound < 1 else 'below'} the bound"
            yield from setting.rows("clipping", what, interleave(clips, setting.repeats), "torch", agreement)


def _one_pass(parameters: list[nn.Parameter], bound: float) -> Tensor:
    """Gradients are read for their norm, and again only where it is above the bound, for which a GPU would have to wait."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    many: Any = torch
    norm = torch.linalg.vector_norm(torch.stack(many._foreach_norm(gradients)))
    if (factor := bound / (float(norm) + 1e-6)) < 1:
        many._foreach_mul_(gradients, factor)
    return norm


def _filled(model: Any) -> list[nn.Parameter]:
    fill(model)
    return trained(model)


# --- AdaLoRA -------------------------------------------------------------------------------------------------------------------------


def adalora(setting: Setting) -> Iterator[Row]:
    """What a step of AdaLoRA adds beside the layers: importance and budget, and the penalty with its gradient; 84 sites, rank 24."""
    from peft import AdaLoraConfig, get_peft_model

    import rankwise as rw
    from rankwise.sites import adapted_sites

    sites, rank, total = (12 if setting.small else 84), 24, 1000
    base = nn.ModuleDict({f"layer{i}": setting.linear(768, 768) for i in range(sites)})
    names = list(base)
    ours: Any = rw.adapt(
        copy.deepcopy(base), rw.recipes.adalora(target_rank=16, init_rank=rank, tinit=0, tfinal=100, interval=1, targets=names)
    )
    optimizer = rw.optimizer(ours, lr=0.0, total_steps=total)
    running: Any = optimizer.rankwise_session.running["schedule"]  # type: ignore[attr-defined]
    config = AdaLoraConfig(init_r=rank, target_r=16, tinit=0, tfinal=100, deltaT=1, total_step=total, target_modules=names, lora_alpha=rank)
    theirs: Any = get_peft_model(base, config)
    pairs = []
    generator = torch.Generator().manual_seed(0)
    for name, site in adapted_sites(ours).items():
        layer = theirs.base_model.model[name]
        update: Any = site.update
        for mine, other in (
            (update.down, layer.lora_A["default"]),
            (update.up, layer.lora_B["default"]),
            (update.lam, layer.lora_E["default"]),
        ):
            values, gradient = (torch.randn(mine.shape, generator=generator).to(mine) for _ in range(2))
            with torch.no_grad():
                mine.copy_(values * 0.05)
                other.copy_(values * 0.05)
            mine.grad, other.grad = gradient.clone(), gradient.clone()
            pairs.append((mine, other))
    from rankwise.schedules.base import Moment

    count = {"rankwise": 0, "PEFT": 0}

    def mine_step() -> None:
        count["rankwise"] += 1
        running.on("step", Moment(count["rankwise"], optimizer))

    def their_step() -> None:
        count["PEFT"] += 1
        theirs.base_model.update_and_allocate(count["PEFT"])

    for _ in range(20):  # far enough that triplets go
        mine_step()
        their_step()
    same = [bool(((mine == 0) == (other == 0)).all()) for mine, other in pairs[2::3]]
    assert sum(same) >= len(same) - 1, "the two prune other triplets"
    agreement = {"rankwise": 1 - sum(same) / len(same)}
    times = interleave({"rankwise": mine_step, "PEFT": their_step}, setting.repeats)
    yield from setting.rows("adalora", f"importance and budget, {sites} sites", times, "PEFT", agreement, {"rankwise": "<= 0.5"})

    def their_penalty() -> None:
        # as PEFT's forward has it, with the backward of that term alone
        loss: Any = 0
        matrices = [(n, p) for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        for n, p in matrices:
            cov = p @ p.T if "lora_A" in n else p.T @ p
            loss = loss + torch.norm(cov - torch.eye(*cov.size(), out=torch.empty_like(cov)).requires_grad_(False), p="fro")
        (0.1 * loss / len(matrices)).backward()

    for mine, other in pairs:
        mine.grad, other.grad = torch.zeros_like(mine), torch.zeros_like(other)
    with torch.no_grad():
        running._orthogonalise()
    their_penalty()
    agreement = {"rankwise": max(compared(mine.grad, other.grad) for i, (mine, other) in enumerate(pairs) if i % 3 != 2)}
    assert agreement["rankwise"] < 1e-4, agreement

    def mine_penalty() -> None:
        with torch.no_grad():
            running._orthogonalise()

    def together(*calls: Callable[[], None]) -> Callable[[], None]:
        return lambda: [call() for call in calls] and None

    times = interleave(
        {"rankwise": together(mine_step, mine_penalty), "PEFT": together(their_step, their_penalty)},
        setting.repeats,
    )
    yield from setting.rows("adalora", f"both, {sites} sites", times, "PEFT", None, {"rankwise": "<= 0.5"})
    times = interleave({"rankwise": mine_penalty, "PEFT": their_penalty}, setting.repeats)
    yield from setting.rows("adalora", f"orthogonality and its gradient, {sites} sites", times, "PEFT", agreement, {"rankwise": "<= 0.5"})
