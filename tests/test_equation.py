"""The operation equals the dense fp64 reference: forward and every gradient, all kinds of factors, shapes, bases and precisions."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Terms, forward, gated_forward, gradients
from torch import Tensor, nn
from toys import Counted

from rankwise import equation
from rankwise.equation import Factors, Start, drop, fused_form, operate, reference_form
from rankwise.errors import RecipeError
from rankwise.storage import storage_of
from rankwise.storage.dense import DENSE

torch.set_num_threads(1)
SEED = 1234  # of the dropout mask, where there is one
FP64 = 1e-12  # relative to the largest entry; fp64 has 2.2e-16 and the sums have up to 50 terms
ROLES = ("down", "up", "core", "tail", "gain")


@pytest.fixture(autouse=True)
def _same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equation, "draw_seed", lambda: SEED)


def draw(width: int, out: int, rank: int, core: str, tail: bool, gain: bool, start: bool, bias: bool, seed: int = 0) -> Terms:
    """Random terms in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Terms(
        normal(out, width),
        normal(rank, width),
        normal(out, rank),
        0.7,
        {"none": None, "vector": normal(rank), "matrix": normal(rank, rank)}[core],
        normal(out) if tail else None,
        normal(out) if gain else None,
        normal(out) if bias else None,
        (normal(rank, width), normal(out, rank)) if start else None,
    )


def leaves(terms: Terms, x: Tensor, dtype: torch.dtype = torch.float64, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Name -> leaf tensor, of x and of the terms that train."""
    found = {"x": x.detach().clone().requires_grad_()}
    for name in ROLES:
        value = getattr(terms, name)
        if value is not None:
            found[name] = value.to(dtype).clone().requires_grad_(name not in frozen)
    return found


def run(form: str, terms: Terms, inputs: dict[str, Tensor], p: float, layer: nn.Module | None = None, token_core=None) -> Tensor:
    """One of the two forms, or the operation over a layer, on leaf tensors."""
    factors = Factors(inputs["down"], inputs["up"], inputs.get("core"), inputs.get("tail"), terms.scaling)
    masters = inputs["down"].dtype
    start = None if terms.start is None else Start(*(t.to(masters) for t in terms.start))
    gain = inputs.get("gain")
    weight = terms.weight.to(inputs["x"].dtype)
    bias = None if terms.bias is None else terms.bias.to(inputs["x"].dtype)
    if layer is not None:
        return operate(inputs["x"], layer, storage_of(layer), factors, start, gain, p, token_core)
    if form == "fused":
        return fused_form(inputs["x"], DENSE, (weight,), bias, factors, start, gain, p, token_core)
    return reference_form(inputs["x"], lambda t: nn.functional.linear(t, weight, bias), bias, factors, start, gain, p, token_core)


def mask_of(x: Tensor, p: float) -> Tensor:
    return drop(torch.ones_like(x), p, SEED) if p else torch.ones_like(x)


def near(got: Tensor | None, want: Tensor, tolerance: float, what: str = "") -> None:
    """Largest error relative to the largest entry of what is wanted."""
    assert got is not None, what
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.detach().double() - want.double()).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.2e}"


def compare(form: str, terms: Terms, x: Tensor, p: float, frozen: tuple[str, ...] = (), layer: nn.Module | None = None) -> None:
    """Forward and all gradients against the closed forms, in fp64; frozen terms get none."""
    inputs = leaves(terms, x, frozen=frozen)
    before = inputs["x"].detach().clone()
    y = run(form, terms, inputs, p, layer)
    flat, mask = x.reshape(-1, x.shape[-1]), mask_of(x, p).reshape(-1, x.shape[-1])
    near(y, forward(terms, flat, mask).view(*x.shape[:-1], len(terms.weight)), FP64, "y")
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    y.backward(g)
    assert torch.equal(inputs["x"], before), "x was modified"
    wanted = gradients(terms, flat, g.reshape(-1, g.shape[-1]), mask)
    for name, leaf in inputs.items():
        if name in frozen:
            assert leaf.grad is None, name
        else:
            near(leaf.grad, wanted[name].view(leaf.shape), FP64, name)


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("core", ["none", "vector", "matrix"])
def test_all_kinds_of_factors_equal_the_closed_forms(form: str, core: str) -> None:
    for number, (tail, gain, start, bias, p) in enumerate(itertools.product(*[(False, True)] * 4, (0.0, 0.3))):
        terms = draw(9, 7, 3, core, tail, gain, start, bias, seed=number)
        compare(form, terms, torch.randn(2, 5, 9, dtype=torch.float64), p)


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("count", range(1, 6))
def test_frozen_roles_get_no_gradient_and_leave_the_others_right(form: str, count: int) -> None:
    terms = draw(6, 8, 4, "matrix", True, True, True, True)
    for frozen in itertools.combinations(ROLES, count):
        for p in (0.0, 0.3):
            compare(form, terms, torch.randn(11, 6, dtype=torch.float64), p, frozen)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 5)),
    core=st.sampled_from(["none", "vector", "matrix"]),
    flags=st.tuples(*[st.booleans()] * 4),
    p=st.sampled_from([0.0, 0.25, 0.9]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    base=st.sampled_from(["linear", "conv1d", "subclass", "hooked", "trained"]),
)
def test_any_shape_layout_and_base(lead: list[int], sizes: tuple[int, int, int], core: str, flags: tuple, p: float, layout: str, base: str) -> None:
    width, out, rank = sizes
    tail, gain, start, bias = flags
    terms = draw(width, out, rank, core, tail, gain, start, bias, seed=width)
    layer = base_layer(base, terms)
    x = laid_out((*lead, width), layout)
    compare("", terms, x, p, layer=layer)
    if base in ("subclass", "hooked"):
        assert getattr(layer, "calls", 1) == 1


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(*shape[::-1], dtype=torch.float64, generator=generator).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return torch.randn(*shape[:-1], shape[-1] * 2, dtype=torch.float64, generator=generator)[..., ::2]
    if layout == "expanded" and len(shape) > 1:
        return torch.randn(*[1] * (len(shape) - 1), shape[-1], dtype=torch.float64, generator=generator).expand(shape)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def base_layer(kind: str, terms: Terms) -> nn.Module:
    """A base layer of a kind with the terms' weight and bias, frozen (but 'trained', whose weight trains)."""
    out, width = terms.weight.shape
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, width).double()
        layer.weight.data = terms.weight.T.contiguous()
        layer.bias.data = torch.zeros(out, dtype=torch.float64)
        if terms.bias is None:
            layer.register_parameter("bias", None)
            layer.forward = lambda x: x @ layer.weight  # Conv1D itself needs a bias
    else:
        layer = (Counted if kind == "subclass" else nn.Linear)(width, out, terms.bias is not None, dtype=torch.float64)
        layer.weight.data = terms.weight.clone()
    if terms.bias is not None:
        layer.bias.data = terms.bias.clone()
    layer.requires_grad_(kind == "trained")
    if kind == "hooked":
        layer.calls = 0
        layer.register_forward_hook(lambda module, args, y: setattr(module, "calls", module.calls + 1))
    return layer


def test_an_opaque_base_is_called_once_and_its_weight_can_train() -> None:
    terms = draw(5, 6, 2, "none", False, True, True, True)
    x = torch.randn(7, 5, dtype=torch.float64)
    layer = base_layer("trained", terms)
    assert not storage_of(layer).fused
    inputs = leaves(terms, x)
    y = run("", terms, inputs, 0.0, layer)
    g = torch.randn_like(y)
    y.backward(g)
    near(layer.weight.grad, (g * terms.gain).T @ x, FP64, "weight")
    near(layer.bias.grad, g.sum(0), FP64, "bias")  # the gain leaves the bias out


def test_the_form_follows_a_fixed_rule() -> None:
    terms = draw(5, 6, 2, "none", False, False, False, True)
    x = torch.randn(3, 5, dtype=torch.float64)
    for kind, form in [("linear", "fused"), ("conv1d", "fused"), ("subclass", "reference"), ("hooked", "reference"), ("trained", "reference")]:
        assert equation.form_of(storage_of(base_layer(kind, terms)), x) == form, kind


@pytest.mark.parametrize("core", ["none", "vector", "matrix"])
def test_gradcheck(core: str) -> None:
    terms = draw(4, 5, 2, core, True, True, True, True)
    names = [name for name in ("x", *ROLES) if name == "x" or getattr(terms, name) is not None]

    def call(p: float, *values: Tensor) -> Tensor:
        return run("fused", terms, dict(zip(names, values, strict=True)), p)

    inputs = list(leaves(terms, torch.randn(2, 3, 4, dtype=torch.float64)).values())
    for p in (0.0, 0.5):
        assert torch.autograd.gradcheck(lambda *values, p=p: call(p, *values), inputs)


# --- token cores -----------------------------------------------------------------------------------------------------------------------


def gates_of(x: Tensor, router: Tensor, rank: int) -> Tensor:
    """Softmax over two experts of half the rank each, repeated over each one's rank: (..., rank)."""
    return torch.softmax(x @ router.T, -1).repeat_interleave(rank // 2, -1)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_a_token_core_equals_one_dense_weight_per_token(p: float, shape: tuple[int, ...]) -> None:
    terms = draw(6, 7, 4, "none", True, True, False, True)
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.reshape(-1, 6)
    router = torch.randn(2, 6, dtype=torch.float64)
    mask = mask_of(x, p).view(-1, 6)
    # the reference: autograd through the dense weights
    wanted = leaves(terms, flat) | {"router": router.clone().requires_grad_()}
    dense = replace(terms, **{name: wanted[name] for name in ("down", "up", "tail", "gain")})
    expected = gated_forward(dense, wanted["x"], gates_of(wanted["x"], wanted["router"], 4), mask)
    g = torch.randn_like(expected)
    expected.backward(g)
    for form in ("fused", "reference"):
        inputs = leaves(terms, x) | {"router": router.clone().requires_grad_()}
        y = run(form, terms, inputs, p, token_core=lambda t, h, inputs=inputs: gates_of(t, inputs["router"], 4) * h)
        near(y, expected.view(y.shape), FP64, "y")
        y.backward(g.view(y.shape))
        for name, leaf in inputs.items():
            near(leaf.grad, wanted[name].grad.view(leaf.shape), FP64, f"{form} {name}")


def test_a_token_core_refuses_a_start_and_a_constant_core() -> None:
    for core, start in (("none", True), ("matrix", False)):
        terms = draw(6, 7, 4, core, False, False, start, True)
        layer = base_layer("linear", terms)
        with pytest.raises(RecipeError, match="token_core"):
            run("", terms, leaves(terms, torch.randn(3, 6, dtype=torch.float64)), 0.0, layer, lambda x, h: h)


# --- fp32 and bf16 ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_stay_within_rounding(dtype: torch.dtype, start: bool, p: float, form: str) -> None:
    """Activations and base in `dtype`, masters in fp32, reference in fp64 on the same rounded numbers.

    fp32: eps * sqrt(longest sum) of the largest entry. bf16: sums run in fp32, what is left are the roundings of the casts of the
    factors, of h, of the base output and of the result: 3 units in the last place of the largest entry.
    """
    width, out, rank, tokens = 96, 80, 8, 64
    terms = draw(width, out, rank, "matrix", True, True, start, True)
    for name, size in (("weight", width), ("down", width), ("up", rank), ("core", rank)):
        setattr(terms, name, (getattr(terms, name) / math.sqrt(size)).float().double())
    for name in ("weight", "bias"):
        setattr(terms, name, getattr(terms, name).to(dtype).double())
    for name in ("tail", "gain"):
        setattr(terms, name, getattr(terms, name).float().double())
    if start:  # a start is near its factors: the difference must keep its digits
        terms.start = (terms.down * 0.9).float().double(), (terms.up * 0.8).float().double()
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(7)).to(dtype)
    inputs = leaves(terms, x, torch.float32)
    y = run(form, terms, inputs, p)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    y.backward(g)
    # the mask's scale is rounded with x * mask to bf16 in the operation; part of the roundings above
    mask = mask_of(x.double(), p)
    wanted = gradients(terms, x.double(), g.double(), mask) | {"y": forward(terms, x.double(), mask)}
    tolerance = torch.finfo(torch.float32).eps * math.sqrt(max(width, tokens)) if dtype == torch.float32 else 3 * 2**-8
    assert y.dtype == dtype
    near(y, wanted["y"], tolerance, "y")
    for name, leaf in inputs.items():
        assert leaf.grad.dtype == leaf.dtype
        near(leaf.grad, wanted[name], tolerance, name)


def test_the_dropout_mask_is_bernoulli_and_unbiased() -> None:
    x = torch.ones(200, 500)
    for p in (0.1, 0.5):
        kept = drop(x, p, 3)
        share = (kept != 0).double().mean()
        assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / x.numel())  # four standard deviations
        assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)), rtol=2**-14)
        assert torch.equal(kept, drop(x, p, 3))
        assert not torch.equal(kept, drop(x, p, 4))
