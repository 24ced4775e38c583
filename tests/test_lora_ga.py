"""LoRA-GA: singular vectors of the gradient, from gradients in fp64."""

import copy
import weakref
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from tiny_models import OneLinear, gpt2, llama, logits, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise import calibration as module_under_test
from rankwise.calibration import beginnings
from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits import LoraGa, Statistics, site_generator
from rankwise.planning import plan
from rankwise.sites import adapted_sites
from rankwise.taps import Sum
from rankwise.updates import Site

RANK, GAMMA = 4, 16.0
DOUBLE = torch.float64


def batch(rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gradient(out: int = 24, width: int = 40, seed: int = 0) -> Tensor:
    """(out, in) in fp64 with singular values 1 / i."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, width)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=DOUBLE)).Q
    v = torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=DOUBLE)).Q
    return (u / torch.arange(1, k + 1, dtype=DOUBLE)) @ v.T


def begin(g: Tensor, rank: int = RANK, tokens: int = 1000, **options: Any) -> tuple[Tensor, Tensor]:
    """(down, up) for a gradient."""
    place = Site("proj", "linear", g.shape[1], g.shape[0], rank, 2.0)
    begun = LoraGa(**options).begin(place, None, Statistics(tokens, gradient=g), site_generator(0, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.down, begun.up


def best(g: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def stored_gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Site name -> gradient (out, in) of the mean loss over all tokens, by autograd with every gradient kept."""
    model = copy.deepcopy(model).requires_grad_(True).eval()
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    for b, count in zip(batches, tokens, strict=True):
        (model(**b).loss * count / sum(tokens)).backward()
    return {
        name: (m.weight.grad if isinstance(m, nn.Linear) else m.weight.grad.T)  # type: ignore[union-attr]
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }


# --- the start -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("lora-ga", 1)
@pytest.mark.parametrize("base", ["keep", "fold"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_start_is_the_base(make: Any, base: str) -> None:
    model, ids = make(), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.lora_ga(rank=RANK, base=base), calibration=[batch()])
    if base == "keep":
        assert torch.equal(logits(model, ids), before)
    else:
        assert relative(logits(model, ids), before) < 1e-5  # the weights moved by several times their size and back
    module = next(iter(adapted_sites(model).values()))
    assert module.offset is not None
    assert module.offset.up.norm() > 1  # it is no small start
    half = llama(dtype=torch.bfloat16)
    rounded = logits(half, ids)
    rw.adapt(half, rw.recipes.lora_ga(rank=RANK), calibration=[batch()])
    assert torch.equal(logits(half, ids), rounded)


@pytest.mark.check("lora-ga", 1)
def test_a_folded_start_in_bf16_is_near_the_base() -> None:
    weight_only = OneLinear(64, 48, dtype=torch.bfloat16)
    g = gradient(48, 64).float()
    recipe = rw.recipes.lora_ga(rank=RANK, base="fold", gamma=64.0)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = x.double() @ weight_only.proj.weight.detach().double().T + weight_only.proj.bias.detach().double()
    made = plan(weight_only, recipe)
    begun = recipe.init.begin(made.sites[0], None, Statistics(99, gradient=g), site_generator(0, "proj"))
    from rankwise.adapting import build

    model = build(weight_only, recipe, made, begun={"proj": begun})
    assert (model(x).double() - exact).norm() / exact.norm() < 1e-2  # bf16 itself rounds by 2e-3


@pytest.mark.check("lora-ga", 2)
@pytest.mark.parametrize("direction", ["down-first", "up-first", "interleaved", "random"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_rows_and_columns_are_orthogonal_of_length_c(shape: tuple[int, int], direction: Any) -> None:
    g = gradient(*shape)
    down, up = begin(g, direction=direction)
    c = shape[0] ** 0.25 / GAMMA**0.5
    eye = torch.eye(RANK, dtype=DOUBLE)
    torch.testing.assert_close(down @ down.T, c**2 * eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(up.T @ up, c**2 * eye, rtol=0, atol=1e-12)
    # together they are the first 2r singular vectors, each once
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    taken = (up.T @ u).abs().amax(0) + (down @ vt.T).abs().amax(0)  # c where one of them has it
    torch.testing.assert_close(taken[: 2 * RANK], torch.full((2 * RANK,), c, dtype=DOUBLE), rtol=0, atol=1e-10)
    assert taken[2 * RANK :].max() < 1e-10


def test_directions_are_those_of_the_paper_and_of_the_official_code() -> None:
    g = gradient()
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    expected = {
        "down-first": (range(4), range(4, 8)),
        "up-first": (range(4, 8), range(4)),
        "interleaved": (range(1, 8, 2), range(0, 8, 2)),
    }
    for direction, (mine, other) in expected.items():
        down, up = begin(g, direction=direction, scale="unit")
        assert (down @ vt[list(mine)].T).diagonal().abs().min() > 1 - 1e-12
        assert (up.T @ u[:, list(other)]).diagonal().abs().min() > 1 - 1e-12
    one = begin(g, direction="random")
    assert all(torch.equal(a, b) for a, b in zip(one, begin(g, direction="random"), strict=True))  # from the site's own stream


@pytest.mark.parametrize(("scale", "c"), [("stable", 24**0.25 / 4), ("gd", 0.5), ("unit", 1.0)])
def test_scales(scale: Any, c: float) -> None:
    down, up = begin(gradient(), scale=scale)
    assert down.norm(dim=1).tolist() == pytest.approx([c] * RANK)
    assert up.norm(dim=0).tolist() == pytest.approx([c] * RANK)


@pytest.mark.check("lora-ga", 3)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_two_pieces_of_the_first_step_are_the_best_approximation(shape: tuple[int, int]) -> None:
    g = gradient(*shape)
    down, up = begin(g)
    left, right = up @ up.T @ g, g @ down.T @ down
    assert abs(float((left * right).sum())) < 1e-12
    c2 = shape[0] ** 0.5 / GAMMA
    torch.testing.assert_close(left + right, c2 * best(g, 2 * RANK), rtol=0, atol=1e-12)
    s = torch.linalg.svdvals(g)
    cosine = float(torch.cosine_similarity((left + right).flatten(), g.flatten(), dim=0))
    assert cosine == pytest.approx(float((s[: 2 * RANK].square().sum() / s.square().sum()).sqrt()), rel=1e-10)


@pytest.mark.check("lora-ga", 4)
def test_the_first_step_moves_the_weight_along_the_gradient() -> None:
    model, b = llama(dtype=DOUBLE), batch()
    gradients = stored_gradients(model, [b])
    rw.adapt(model, rw.recipes.lora_ga(rank=RANK), calibration=[b])
    before = {name: module.merged_weight() for name, module in adapted_sites(model).items()}
    lr = 1e-6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**b).loss.backward()
    optimizer.step()
    for name, module in adapted_sites(model).items():
        c2 = module.site.out_features**0.5 / GAMMA
        expected = -(module.site.scaling**2) * c2 * best(gradients[name], 2 * RANK)
        moved = (module.merged_weight() - before[name]) / lr
        assert relative(moved, expected) < 1e-4, name  # O(lr)


@pytest.mark.check("lora-ga", 5)
def test_every_disjoint_split_is_optimal_and_an_overlap_is_not() -> None:
    g = gradient()
    u, s, vt = torch.linalg.svd(g, full_matrices=False)

    def residual(mine: list[int], other: list[int]) -> float:
        return float((u[:, other] @ u[:, other].T @ g + g @ vt[mine].T @ vt[mine] - g).norm())

    bound = float(s[2 * RANK :].norm())
    for seed in range(6):
        order = torch.randperm(2 * RANK, generator=torch.Generator().manual_seed(seed)).tolist()
        assert residual(order[:RANK], order[RANK:]) == pytest.approx(bound, rel=1e-10)
    assert residual(list(range(RANK)), list(range(RANK))) > 1.1 * bound
    for direction in ("down-first", "up-first", "interleaved", "random"):
        down, up = begin(g, direction=direction, scale="unit")
        assert float((up @ up.T @ g + g @ down.T @ down - g).norm()) == pytest.approx(bound, rel=1e-10)


class Louder(nn.Module):
    """A model whose loss is larger."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, **inputs: Any) -> Any:
        return {"loss": self.inner(**inputs).loss * self.factor}


@pytest.mark.check("lora-ga", 6)
@pytest.mark.parametrize("factor", [100.0, 1e-12])
def test_the_size_of_the_loss_does_not_matter(factor: float) -> None:
    starts = []
    for size in (1.0, factor):
        model = rw.adapt(Louder(llama(dtype=DOUBLE), size), rw.recipes.lora_ga(rank=RANK), calibration=[batch()])
        starts.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*starts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # Llama's norm rounds to fp32


# --- the gradient, streamed ------------------------------------------------------------------------------------------------------------


def subspace_cosine(one: Tensor, other: Tensor) -> float:
    """The smallest cosine between two row spaces."""
    return float(torch.linalg.svdvals(torch.linalg.qr(one.T).Q.T @ torch.linalg.qr(other.T).Q)[-1])


@pytest.mark.check("lora-ga", 7)
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("budget", [1, 20_000, 2**30])
def test_streamed_in_chunks_is_the_same_as_from_all_gradients(make: Any, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    batches = [batch(3, 9, 1), batch(2, 7, 2), batch(4, 5, 3)]  # of unequal numbers of tokens
    batches[1]["labels"] = batches[1]["labels"].masked_fill(torch.arange(7) < 4, -100)
    gradients = stored_gradients(model, batches)
    recipe = rw.recipes.lora_ga(rank=RANK)
    sites = plan(model, recipe).sites
    alive: list[Any] = []
    peak = 0

    class Watched(Sum):
        def add(self, *args: Any, **kwargs: Any) -> None:
            nonlocal peak
            fresh = self.matrix is None
            super().add(*args, **kwargs)
            if fresh:
                assert self.matrix is not None
                alive.append(weakref.ref(self.matrix))
            peak = max(peak, sum(m.numel() * m.element_size() for m in (ref() for ref in alive) if m is not None))

    monkeypatch.setattr(module_under_test, "Sum", Watched)
    begun = beginnings(model, recipe, sites, batches, budget)
    largest = max(s.in_features * s.out_features * 4 for s in sites)
    assert 0 < peak <= max(budget, largest)  # with a budget of 1 it is one layer's gradient and no more
    assert not [ref for ref in alive if ref() is not None]
    for place in sites:
        down, up = begun[place.name].down, begun[place.name].up
        expected_down, expected_up = _of(gradients[place.name], place)
        assert down is not None
        assert up is not None
        assert subspace_cosine(down, expected_down) > 1 - 1e-6
        assert subspace_cosine(up.T, expected_up.T) > 1 - 1e-6
    assert all(p.grad is None for p in model.parameters())


def _of(g: Tensor, place: Site) -> tuple[Tensor, Tensor]:
    begun = LoraGa().begin(place, None, Statistics(99, gradient=g), site_generator(0, place.name))
    assert begun.down is not None
    assert begun.up is not None
    return begun.down, begun.up


@pytest.mark.check("lora-ga", 8)
def test_a_sketch_through_thin_products_is_the_sketch_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(4)
    g, x = torch.randn(50, 24, generator=generator), torch.randn(50, 40, generator=generator)
    whole, right, left = Sum(), Sum(right=torch.randn(40, 6, generator=generator)), Sum(left=torch.randn(24, 5, generator=generator))
    for part in (whole, right, left):
        for rows in (slice(0, 20), slice(20, 50)):
            part.add(g[rows], x[rows])
    assert whole.matrix is not None
    assert right.matrix is not None
    assert left.matrix is not None
    assert relative(right.matrix, whole.matrix @ right.right) < 1e-5
    assert relative(left.matrix, left.left.T @ whole.matrix) < 1e-5  # type: ignore[union-attr]
    assert right.matrix.shape == (24, 6)
    assert left.matrix.shape == (5, 40)


@pytest.mark.check("lora-ga", 8)
def test_the_sketched_start_is_nearly_as_good_as_the_full_one() -> None:
    model, batches = llama(hidden_size=64, intermediate_size=96), [batch(6, 20, 1), batch(6, 20, 2)]
    gradients = stored_gradients(model, batches)
    recipe = rw.recipes.lora_ga(rank=2, estimate="sketch")  # 16 of 32 to 96 columns
    sites = plan(model, recipe).sites
    assert all(min(s.in_features, s.out_features) > 16 for s in sites)
    begun = beginnings(model, recipe, sites, batches)
    for place in sites:
        g = gradients[place.name]
        down, up = begun[place.name].down, begun[place.name].up
        assert down is not None
        assert up is not None
        c = place.out_features**0.25 / GAMMA**0.5
        torch.testing.assert_close(down @ down.T, c**2 * torch.eye(2), rtol=0, atol=1e-5)
        step = up @ up.T @ g + g @ down.T @ down
        s = torch.linalg.svdvals(g)
        most = float((s[:4].square().sum() / s.square().sum()).sqrt())
        assert float(torch.cosine_similarity(step.flatten(), g.flatten(), dim=0)) > 0.93 * most, (
            place.name
        )  # a flat spectrum, the worst case


class Given(OneLinear):
    """A loss whose gradient by the weight is r^T x."""

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return (super().forward(x) * r).sum()


@pytest.mark.check("lora-ga", 8)
def test_the_sketched_start_on_a_falling_spectrum() -> None:
    g = gradient(96, 128)
    model = Given(128, 96)
    recipe = rw.recipes.lora_ga(rank=4, estimate="sketch", scale="unit")
    rw.adapt(model, recipe, calibration=[{"x": torch.eye(128, dtype=DOUBLE), "r": g.T}])
    update: Any = site(model).update
    down, up = update.down.detach(), update.up.detach()
    cosine = float(torch.cosine_similarity((up @ up.T @ g + g @ down.T @ down).flatten(), g.flatten(), dim=0))
    s = torch.linalg.svdvals(g)
    best_cosine = float((s[:8].square().sum() / s.square().sum()).sqrt())
    assert 0.995 * best_cosine < cosine < best_cosine


def test_checkpointed_blocks_give_the_same_start() -> None:
    starts = []
    for checkpointing in (False, True):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rw.adapt(model.train(), rw.recipes.lora_ga(rank=RANK), calibration=[batch()])
        starts.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


# --- files, ranks, quantized bases -------------------------------------------------------------------------------------------------------


@pytest.mark.check("lora-ga", 9)
@pytest.mark.parametrize("scaling", ["rslora", "lora"])
def test_the_export_of_twice_the_rank_reproduces_the_outputs(scaling: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, b = llama(), batch()
    rw.adapt(model, rw.recipes.lora_ga(rank=RANK, scaling=scaling), calibration=[b])
    optimizer = rw.optimizer(model, lr=1e-2)
    for _ in range(3):
        model(**b).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rw.save(model, tmp_path / "a")
    trained = logits(model, token_ids())
    assert relative(trained, logits(llama(), token_ids())) > 1e-2
    monkeypatch.setattr(LoraGa, "begin", None)  # no gradient, no decomposition: all is in the file
    assert torch.equal(logits(rw.load(llama(), tmp_path / "a"), token_ids()), trained)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    assert theirs.peft_config["default"].r == 2 * RANK  # type: ignore[union-attr]
    assert relative(logits(theirs, token_ids()), trained) < 1e-5


@pytest.mark.check("lora-ga", 10)
@pytest.mark.parametrize("options", [{}, {"svd": "randomized"}, {"estimate": "sketch"}, {"direction": "random"}])
def test_another_global_seed_gives_the_same_start(options: dict[str, Any]) -> None:
    starts = []
    for seed in (1, 2):
        model = llama()
        torch.manual_seed(seed)
        rw.adapt(model, rw.recipes.lora_ga(rank=RANK, **options), calibration=[batch()])
        starts.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


class FourBit(nn.Module):
    """A vendor's 4-bit layer: codes of 4 bits and a scale per row; it can only be called."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        weight = dense.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("scale", scale)
        self.codes = nn.Parameter(((weight / scale).round() + 8).to(torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.codes.to(x.dtype) - 8) * self.scale)


@pytest.mark.check("lora-ga", 11)
@pytest.mark.parametrize("estimate", ["full", "sketch"])
def test_a_4_bit_base_starts_exactly_and_is_not_written(estimate: Any) -> None:
    model = llama()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, FourBit(getattr(block.mlp, name)))
    before = logits(model, token_ids())
    assert relative(before, logits(llama(), token_ids())) > 1e-3  # it is quantized
    codes = [p.detach().clone() for p in model.parameters() if p.dtype == torch.uint8]
    assert len(codes) == 6
    recipe = rw.recipes.lora_ga(rank=RANK, estimate=estimate, targets=["gate_proj", "up_proj", "down_proj", "q_proj"])
    rw.adapt(model, recipe, calibration=[batch()])
    assert torch.equal(logits(model, token_ids()), before)
    module = site(model, "model.layers.0.mlp.up_proj")
    assert module.update is not None
    assert module.update.up.norm() > 0.5  # type: ignore[union-attr]
    assert all(torch.equal(p, q) for p, q in zip([p for p in model.parameters() if p.dtype == torch.uint8], codes, strict=True))


@pytest.mark.check("lora-ga", 11)
@pytest.mark.parametrize("make", [rw.recipes.lora_ga, rw.recipes.corda])
@pytest.mark.parametrize("estimate", ["before", "on"])
def test_an_nf4_base_starts_exactly(make: Any, estimate: str) -> None:
    """Calibrated before the base is quantized, by one recipe, or on a base that is in 4 bits already."""
    quantized = rw.unadapt(rw.adapt(llama(), rw.recipes.lora(rank=RANK, storage="nf4")))
    expected = logits(quantized, token_ids())
    assert relative(expected, logits(llama(), token_ids())) > 1e-3
    codes = [p.detach().clone() for p in (*quantized.parameters(), *quantized.buffers()) if p.dtype == torch.uint8]
    assert codes
    recipe = make(rank=RANK)
    if estimate == "before":
        model = rw.adapt(llama(), recipe.replace(storage="nf4"), calibration=[batch()])
    else:
        model = rw.adapt(quantized, recipe, calibration=[batch()])
        held = [p for p in (*model.parameters(), *model.buffers()) if p.dtype == torch.uint8]
        assert len(held) == len(codes)
        assert all(any(torch.equal(p, q) for q in codes) for p in held)
    assert torch.equal(logits(model, token_ids()), expected)
    modules = adapted_sites(model).values()
    assert all(type(module.base_layer).__name__ == "NF4Linear" and module.offset is not None for module in modules)
    assert all(bool(module.offset.up.any()) for module in modules)  # type: ignore[union-attr]
    b = batch()
    model(**b).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


# --- bad input -------------------------------------------------------------------------------------------------------------------------


def test_bad_calibration_data_is_refused_with_the_remedy() -> None:
    recipe = rw.recipes.lora_ga(rank=RANK)
    b = batch()
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    cases: list[tuple[Any, Any, str]] = [
        (llama(), None, r"calibration is missing.*calibration=\[batch, ...\]"),
        (llama(), [], "holds no batch"),
        (llama(), [b["input_ids"]], r"calibration\[0\] is a Tensor; give a dict"),
        (llama(), [{"input_ids": b["input_ids"]}], "returned no loss.*labels"),
        (llama(), [b | {"labels": torch.full_like(b["labels"], -100)}], r"calibration\[0\] has no token with a loss"),
        (llama(), [batch(1, 5)], "saw 5 calibration tokens, and 8 directions.*calibration_rows"),
        (broken, [b], "are not finite; look for broken rows or weights"),
    ]
    for model, data, message in cases:
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(CalibrationError, match=message):
            rw.adapt(model, recipe, calibration=data)
        assert not adapted_sites(model)
        assert not hasattr(model, "rankwise")
        assert flags == [p.requires_grad for p in model.parameters()]
        assert not any(m._forward_hooks for m in model.modules())


def test_a_site_that_is_never_called_or_gets_no_gradient_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self, call: bool) -> None:
            super().__init__()
            self.used, self.idle = OneLinear(8, 8, dtype=torch.float32), OneLinear(8, 8, dtype=torch.float32)
            self.call = call

        def forward(self, x: Tensor) -> Any:
            if self.call:
                self.idle(x)
            return {"loss": self.used(x).square().mean()}

    for call, message in ((False, "idle.proj was not called"), (True, "no gradient reached idle.proj")):
        with pytest.raises(CalibrationError, match=message):
            rw.adapt(Idle(call), rw.recipes.lora_ga(rank=2), calibration=[{"x": torch.randn(20, 8)}])
    with pytest.raises(CalibrationError, match="the gradient at proj is zero"):
        begin(torch.zeros(8, 8))


def test_few_directions_are_shared_and_said() -> None:
    g = gradient(6, 40)
    place = Site("proj", "linear", 40, 6, 4, 1.0)
    begun = LoraGa(scale="unit").begin(place, None, Statistics(99, gradient=g), site_generator(0, "proj"))
    assert begun.notes == ("`down` and `up` share 2 directions: the gradient has no more than 6",)
    assert begun.down is not None
    assert begun.up is not None
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert (begun.down @ vt[:4].T).diagonal().abs().min() > 1 - 1e-12
    assert (begun.up.T @ u[:, 2:6]).diagonal().abs().min() > 1 - 1e-12
    thin = g.clone()
    thin[:] = best(g, 3)
    notes = LoraGa().begin(place, None, Statistics(99, gradient=thin), site_generator(0, "proj")).notes
    assert any("has rank 3, so 3 of 6 directions are arbitrary" in note for note in notes)


def test_two_learning_rates_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"init=lora-ga cannot be combined with gradient=lora-plus: .*use gradient='plain'"):
        rw.recipes.lora_ga(gradient="lora-plus")


# --- the state of the model, the plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [rw.recipes.lora_ga(rank=RANK), rw.recipes.lora_ga(rank=RANK, estimate="sketch")])
def test_the_model_is_left_as_it_was(recipe: Any) -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad = False
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    one = beginnings(model, recipe, plan(model, recipe).sites, [batch()])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.grad for p in model.parameters() if p.grad is not None] == [kept]
    assert bool((kept == 1).all())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    # in evaluation mode, so dropout had no say
    other = beginnings(llama(), recipe, plan(llama(), recipe).sites, [batch()])
    for name, begun in one.items():
        assert begun.down is not None
        assert torch.equal(begun.down, other[name].down)  # type: ignore[arg-type]


def test_the_plan_says_that_calibration_will_run() -> None:
    text = str(rw.plan(llama(), rw.recipes.lora_ga(rank=RANK, calibration_rows=40)))
    assert "calibration runs before training (gradient): 40 rows" in " ".join(text.split())
    assert "calibration" not in str(rw.plan(llama(), rw.recipes.pissa(rank=RANK)))


# --- PEFT ------------------------------------------------------------------------------------------------------------------------------


def peft_start(factor: float) -> tuple[Any, Any]:
    """PEFT's model and the one its gradients were taken on, with the loss times a factor."""
    model, batches = llama().eval(), [batch(4, 9, 1), batch(4, 9, 2)]
    config = LoraConfig(
        r=RANK, lora_alpha=8, use_rslora=True, init_lora_weights="lora_ga", target_modules=["q_proj", "up_proj", "down_proj"],
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    preprocess_loraga(model, config, lambda: [(model(**b).loss * factor).backward() for b in batches] and None)
    gradients = {name: m._peft_loraga_grad for name, m in model.named_modules() if hasattr(m, "_peft_loraga_grad")}
    return get_peft_model(model, config), gradients


def test_gradients_and_directions_are_pefts_and_its_scaling_is_not_ours() -> None:
    theirs, gradients = peft_start(1.0)
    louder, _ = peft_start(1000.0)
    batches = [batch(4, 9, 1), batch(4, 9, 2)]
    ours = rw.adapt(llama(), rw.recipes.lora_ga(rank=RANK, alpha=8, targets=["q_proj", "up_proj", "down_proj"]), calibration=batches)
    own = stored_gradients(llama(), batches)
    for name, module in adapted_sites(ours).items():
        torch.testing.assert_close(gradients[name], own[name], rtol=1e-4, atol=1e-7)
        layer = theirs.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == module.site.scaling
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        update: Any = module.update
        down, up = update.down.detach(), update.up.detach()
        assert subspace_cosine(a, down) > 1 - 1e-4
        assert subspace_cosine(b.T, up.T) > 1 - 1e-4
        c = module.site.out_features**0.25 / 4
        torch.testing.assert_close(up.norm(dim=0), torch.full((RANK,), c), rtol=1e-5, atol=0)
        assert bool((b.norm(dim=0) < 0.5 * c).all())  # PEFT multiplies by the gradient's singular values
        loud = louder.base_model.model.get_submodule(name).lora_B["default"].weight.detach()
        assert float(loud.norm() / b.norm()) == pytest.approx(1000, rel=1e-2)  # so its start grows with the loss: ours does not (6)
