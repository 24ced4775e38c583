"""The operation with token cores, and in fp32 and bf16, against the dense fp64 reference."""

import math
from dataclasses import replace

import pytest
import torch
from operation import FP64, SEED, base_layer, draw, leaves, mask_of, near, run
from reference import forward, gated_forward, gradients
from torch import Tensor

from rankwise import equation
from rankwise.equation import fused_form, reference_form
from rankwise.errors import RecipeError
from rankwise.kernels import dropout
from rankwise.storage.dense import DENSE

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equation, "draw_seed", lambda: SEED)
    monkeypatch.setattr(dropout, "draw_seed", lambda: SEED)


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


def test_a_gain_between_two_bf16_numbers_acts_in_full() -> None:
    """A gain of 1 + 0.0059 would be 1 + 0.0078 in bf16. Every entry is rounded, so the size is taken over many: forward and backward."""
    width, wanted = 256, 1.0059
    x, g = (torch.randn(400, width, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    x.requires_grad_()
    for form in ("fused", "reference"):
        x.grad = None
        weight, gain = torch.eye(width).bfloat16(), torch.full((width,), wanted)
        if form == "fused":
            y = fused_form(x, DENSE, (weight,), None, None, None, gain)
        else:
            y = reference_form(x, lambda t, weight=weight: t @ weight.T, None, None, None, gain)
        y.backward(g)
        for got, unit in ((y, x), (x.grad, g)):
            size = (got.double() * unit.double()).sum() / unit.double().square().sum()
            assert abs(size.item() - wanted) < 5e-4  # rounding to nearest has a bias of 2.5e-4 here; a gain in bf16 is off by 1.9e-3
