"""The section `inits` of `benchmarks.parts`: starts from singular vectors, against PEFT's."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import synchronize
from benchmarks.parts_rows import Row, Setting, overlap

RANK = 16
LAYER = {(4096, 4096): 4, (11008, 4096): 3}  # the linear layers of a 7B model's layer; down_proj is up_proj's transpose
LAYERS = 32


def weight_like(setting: Setting, out: int, wide: int) -> Tensor:
    """A weight whose leading singular values fall slowly like those of trained models: 1 / sqrt(i), over a floor of noise."""
    inner = min(out, wide) // 4
    left, right = setting.randn(out, inner), setting.randn(inner, wide)
    falling = torch.arange(1, inner + 1, device=setting.device).float().rsqrt()
    return (left * falling) @ right * (0.02 / inner**0.5) + 0.01 * setting.randn(out, wide)


def best(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it gives, and the seconds of the fastest of three runs, or of fewer where they take more than five seconds together."""
    made, fastest, spent = None, float("inf"), 0.0
    for _ in range(3):
        synchronize()
        begin = time.perf_counter()
        made = call()
        synchronize()
        seconds = time.perf_counter() - begin
        fastest, spent = min(fastest, seconds), spent + seconds
        if spent > 5:
            break
    assert made is not None
    return made.detach(), fastest


def inits(setting: Setting) -> Iterator[Row]:
    """Starts at one layer, the best of up to three runs; `difference` is 1 - overlap with the exact subspace.

    The line of the 7B model is not run: it adds up 32 x (4 of 4096 x 4096 and 3 of 11008 x 4096) from the lines above it."""
    shapes = [(1024, 1024)] if setting.small else list(LAYER)
    whole = {"rankwise": 0.0, "PEFT": 0.0, "PEFT, pissa_niter_4": 0.0}
    worst = dict.fromkeys(whole, 0.0)
    for out, wide in shapes:
        weight = weight_like(setting, out, wide)
        exact: dict[str, Tensor] = {}
        for name, call in _pissa(setting, weight).items():
            basis, seconds = best(call)
            exact.setdefault("pissa", basis)  # PEFT's comes first
            missing = 1 - overlap(basis, exact["pissa"])
            whole[name] += LAYERS * LAYER.get((out, wide), 0) * seconds
            worst[name] = max(worst[name], missing)
            yield _row(f"PiSSA {out} x {wide}", name, seconds, missing, whole, "<= 0.1, difference <= 0.01")
        for title, contenders, target in (
            ("MiLoRA (minor)", _minor(weight), None),
            ("CorDA (ipm)", _corda(setting, weight), None),
            ("LoRA-GA", _lora_ga(setting, weight), None),
        ):
            reference: Tensor | None = None
            base = 0.0
            for name, call in contenders.items():
                basis, seconds = best(call)
                reference = basis if reference is None else reference
                base = base or seconds
                row = _row(f"{title} {out} x {wide}", name, seconds, 1 - overlap(basis, reference), {}, target)
                yield row | {"ratio": seconds / base}
    if not setting.small:
        for name, seconds in whole.items():
            row = _row("PiSSA of a 7B model, added up", name, seconds, worst[name], {}, "<= 0.1, difference <= 0.01")
            yield row | {"ratio": seconds / whole["PEFT"]}


_BASE: dict[str, float] = {}


def _row(what: str, name: str, seconds: float, missing: float, whole: dict[str, float], target: str | None) -> Row:
    if name == "PEFT":
        _BASE[what] = seconds
    return {
        "section": "inits",
        "what": what,
        "contender": name,
        "ms": 1000 * seconds,
        "p10_ms": None,
        "p90_ms": None,
        "ratio": seconds / _BASE[what] if what in _BASE else None,
        "difference": missing,
        "target": target if name == "rankwise" else None,
    }


def _pissa(setting: Setting, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Whole starts of one layer; each gives the span of `up`, (out, rank)."""
    from peft import LoraConfig, get_peft_model

    import rankwise as rw
    from rankwise.sites import adapted_sites

    out, wide = weight.shape

    def fresh() -> nn.Module:
        layer = nn.Linear(wide, out, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone())
        return nn.Sequential(layer)

    def theirs(how: Any) -> Tensor:
        made = get_peft_model(fresh(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=how))
        layer: Any = made.base_model.model[0]
        return torch.linalg.qr(layer.lora_B["default"].weight).Q

    def ours() -> Tensor:
        made = rw.adapt(fresh(), rw.recipes.pissa(rank=RANK, targets=["0"], base="fold"))
        update: Any = adapted_sites(made)["0"].update
        return torch.linalg.qr(update.up).Q

    return {"PEFT": lambda: theirs("pissa"), "rankwise": ours, "PEFT, pissa_niter_4": lambda: theirs("pissa_niter_4")}


def _site(weight: Tensor) -> Any:
    from rankwise.updates import Site

    return Site("site", "linear", weight.shape[1], weight.shape[0], RANK, 1.0, float(RANK))


def _minor(weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """PEFT has no MiLoRA; the official code takes a full SVD in fp32."""
    from rankwise.inits.spectral import MinorComponents

    def official() -> Tensor:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        up, down = u[:, -RANK:] * s[-RANK:].sqrt(), s[-RANK:, None].sqrt() * v[-RANK:]
        assert torch.isfinite(weight - up @ down).all()
        return u[:, -RANK:]

    def ours() -> Tensor:
        made = MinorComponents().begin(_site(weight), weight, None, torch.Generator().manual_seed(0))
        assert made.up is not None
        return torch.linalg.qr(made.up).Q

    return {"full SVD": official, "rankwise": ours}


def _corda(setting: Setting, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """From the same covariance on; gathering it is not timed."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    from rankwise.inits.base import Statistics
    from rankwise.inits.corda import Corda

    x = setting.randn(2 * weight.shape[1], weight.shape[1]) * (1 + 3 * torch.rand(weight.shape[1], device=weight.device))
    covariance = x.T @ x / len(x)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.covariance_matrix = covariance  # type: ignore[assignment]

    def theirs() -> Tensor:
        config = LoraConfig(r=RANK, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
        return collect_eigens_for_layer(layer, config).U_WC[:, :RANK].to(weight.device)

    def ours() -> Tensor:
        statistics = Statistics(len(x), covariance=covariance, energy=float(covariance.trace()))
        made = Corda(damping=0.01).begin(_site(weight), weight, statistics, torch.Generator().manual_seed(0))
        assert made.up is not None
        return torch.linalg.qr(made.up).Q

    return {"PEFT": theirs, "rankwise": ours}


def _lora_ga(setting: Setting, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """From the same gradient on. PEFT's is randomized too, but without a test of whether it has found the directions."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import LoraGAConfig

    from rankwise.inits.base import Statistics
    from rankwise.inits.lora_ga import LoraGa

    gradient = weight_like(setting, *weight.shape)

    def exact() -> Tensor:
        return torch.linalg.svd(gradient, full_matrices=False).U[:, RANK : 2 * RANK]

    def theirs() -> Tensor:
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone())
        layer._peft_loraga_grad = gradient
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArB2r")
        )
        made: Any = get_peft_model(nn.Sequential(layer), config)
        return torch.linalg.qr(made.base_model.model[0].lora_B["default"].weight).Q

    def ours() -> Tensor:
        statistics = Statistics(10**6, gradient=gradient)
        made = LoraGa(direction="down-first").begin(_site(weight), weight, statistics, torch.Generator().manual_seed(0))
        assert made.up is not None
        return torch.linalg.qr(made.up).Q

    return {"exact SVD": exact, "PEFT": theirs, "rankwise": ours}
