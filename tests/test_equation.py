"""The operation equals the dense fp64 reference: forward and every gradient, all kinds of factors, shapes and bases."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operation import FP64, ROLES, SEED, base_layer, compare, draw, laid_out, leaves, near, run
from torch import Tensor

from rankwise import equation
from rankwise.equation import drop
from rankwise.kernels import dropout, site
from rankwise.storage import storage_of

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equation, "draw_seed", lambda: SEED)
    monkeypatch.setattr(dropout, "draw_seed", lambda: SEED)


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("core", ["none", "vector", "matrix"])
def test_all_kinds_of_factors_equal_the_closed_forms(form: str, core: str) -> None:
    for number, (tail, gain, start, bias, p) in enumerate(itertools.product(*[(False, True)] * 4, (0.0, 0.2, 0.3))):
        terms = draw(9, 7, 3, core, tail, gain, start, bias, seed=number)
        compare(form, terms, torch.randn(2, 5, 9, dtype=torch.float64), p)


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("count", range(1, 6))
def test_frozen_roles_get_no_gradient_and_leave_the_others_right(form: str, count: int) -> None:
    terms = draw(6, 8, 4, "matrix", True, True, True, True)
    for frozen in itertools.combinations(ROLES, count):
        for p in (0.0, 0.3):
            compare(form, terms, torch.randn(11, 6, dtype=torch.float64), p, frozen)


@pytest.mark.parametrize("core", ["none", "vector", "matrix"])
@pytest.mark.parametrize("start", [False, True])
def test_a_frozen_up_spares_a_product_by_keeping_what_it_made(core: str, start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With up h kept (which stands at large ranks) as without; `tail` trains and `up` does not."""
    terms = draw(6, 8, 4, core, True, True, start, True)
    x = torch.randn(11, 6, dtype=torch.float64)
    for keeps_from in (1, 1000):
        monkeypatch.setattr(site, "_KEEPS_PRODUCT_FROM", keeps_from)
        for frozen in (("up",), ("down", "up"), ("down", "up", "core"), ("up", "gain")):
            for p in (0.0, 0.3):
                compare("fused", terms, x, p, frozen)


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
def test_any_shape_layout_and_base(
    lead: list[int], sizes: tuple[int, int, int], core: str, flags: tuple, p: float, layout: str, base: str
) -> None:
    width, out, rank = sizes
    tail, gain, start, bias = flags
    terms = draw(width, out, rank, core, tail, gain, start, bias, seed=width)
    layer = base_layer(base, terms)
    x = laid_out((*lead, width), layout)
    compare("", terms, x, p, layer=layer)
    if base in ("subclass", "hooked"):
        assert getattr(layer, "calls", 1) == 1


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
    for kind, form in [
        ("linear", "fused"),
        ("conv1d", "fused"),
        ("subclass", "reference"),
        ("hooked", "reference"),
        ("trained", "reference"),
    ]:
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


def test_the_dropout_mask_is_bernoulli_and_unbiased() -> None:
    x = torch.ones(200, 500)
    for p in (0.1, 0.5):
        kept = drop(x, p, 3)
        share = (kept != 0).double().mean()
        assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / x.numel())  # four standard deviations
        assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)), rtol=2**-14)
        assert torch.equal(kept, drop(x, p, 3))
        assert not torch.equal(kept, drop(x, p, 4))


def test_the_stacked_pair_is_the_update_less_its_start() -> None:
    down, up, down0, up0 = torch.randn(3, 9), torch.randn(7, 3), torch.randn(3, 9), torch.randn(7, 3)
    core, scaling = torch.randn(3, 3), 1.7
    factors, start = equation.Factors(down, up, core=core, scaling=scaling), equation.Start(down0, up0)
    wanted = scaling * (up @ core @ down - up0 @ down0)
    right, left = equation.stacked(factors, start)
    torch.testing.assert_close(left @ right, wanted)
    torch.testing.assert_close(equation.dense_update(factors, start), wanted)
