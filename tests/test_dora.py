"""The Checks of DoRA's specification on values and gradients (7 to 9 are in test_dora_cost.py and test_traps.py)."""

import copy
from typing import Any

import pytest
import torch
from dora_models import adapted_weight, made, peft_twin
from reference import dora_gradients
from torch.nn.functional import linear
from toys import Mlp, one, only_site, stir

import rankwise as rw
from rankwise.recipes import RECIPES, dora
from rankwise.sites import adapted_sites

torch.set_num_threads(1)


@pytest.mark.check("dora", 1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_the_start_is_the_base_and_the_magnitude_is_pefts(dtype: torch.dtype, norm_grad: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = one(96, 80, dtype=dtype)
    model = rw.adapt(copy.deepcopy(base), dora(norm_grad, rank=8))
    x = torch.randn(3, 7, 96).to(dtype)
    for training in (True, False):
        model.train(training)
        assert torch.equal(model(x), base(x))
    site = only_site(model)
    gain = site.gain(site.base_layer, site.storage, site.update.factors(), None)
    assert torch.equal(gain, torch.ones(80))
    theirs = get_peft_model(copy.deepcopy(base).float(), LoraConfig(r=8, target_modules=["0"], use_dora=True))
    wanted = theirs.get_submodule("base_model.model.0").lora_magnitude_vector.default.weight
    torch.testing.assert_close(site.gain.saved()["magnitude"], wanted.detach(), rtol=1e-6, atol=0)


STARTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "alpha 1": {"alpha": 1.0},
    "rank 1": {"rank": 1},
    "rank 14": {"rank": 14},
    "pissa keep": {"init": "pissa"},
    "pissa fold": {"init": "pissa", "base": "fold"},
    "milora fold": {"init": "milora-svd", "base": "fold"},
    "moslora": {"update": "moslora"},
}


@pytest.mark.check("dora", 2)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("start", [*STARTS, "vera"])
def test_the_norm_from_the_factors_is_that_of_the_dense_weight(start: str, dtype: torch.dtype, tolerance: float) -> None:
    if start == "vera":
        model = stir(rw.adapt(one(20, 14, dtype=dtype), RECIPES["vera"](rank=24, gain="dora")))
    else:
        model = made(dtype, **STARTS[start])
    site = only_site(model)
    for size in (0.0, 0.3, 3.0):
        stir(model, size=size)
        norm = site.gain.norm(site.base_layer, site.storage, site.update.factors(), site.subtracted())
        torch.testing.assert_close(norm.double(), adapted_weight(site).norm(dim=1), rtol=tolerance, atol=0)


@pytest.mark.check("dora", 3)
def test_detached_gradients_equal_pefts() -> None:
    torch.manual_seed(0)
    plain = Mlp()
    model = stir(rw.adapt(copy.deepcopy(plain), dora(rank=4)))
    theirs = peft_twin(model, plain)
    x, g = torch.randn(2, 6, 24), torch.randn(2, 6, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(leaf) for each, leaf in zip((model, theirs), inputs, strict=True)]
    for y in outputs:
        y.backward(g)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for name, site in adapted_sites(model).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        for mine, other in (
            (site.update.down, layer.lora_A.default.weight),
            (site.update.up, layer.lora_B.default.weight),
            (site.gain.magnitude, layer.lora_magnitude_vector.default.weight),
        ):
            scale = other.grad.abs().max()
            torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-5)


@pytest.mark.check("dora", 3)
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_gradients_equal_the_closed_forms_and_autograd(norm_grad: str) -> None:
    model = made(norm_grad=norm_grad)
    site, layer, update = only_site(model), only_site(model).base_layer, only_site(model).update
    s, start = site.site.scaling, site.gain.magnitude0
    x, g = torch.randn(9, 20, dtype=torch.float64), torch.randn(9, 14, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    model(leaf).backward(g)
    closed = dora_gradients(layer.weight.detach(), update.down.detach(), update.up.detach(), start + site.gain.magnitude.detach(), s, x, g)
    kind = " full" if norm_grad == "full" else ""
    naive = [t.detach().clone().requires_grad_() for t in (x, update.down, update.up, site.gain.magnitude)]
    v = layer.weight + s * naive[2] @ naive[1]
    c = v.norm(dim=1) if kind else v.norm(dim=1).detach()
    (linear(naive[0], v) * ((start + naive[3]) / c) + layer.bias).backward(g)
    got = {"x": leaf.grad, "down" + kind: update.down.grad, "up" + kind: update.up.grad, "magnitude": site.gain.magnitude.grad}
    for (name, value), reference in zip(got.items(), naive, strict=True):
        torch.testing.assert_close(value, closed[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(value, reference.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.check("dora", 4)
def test_the_full_gradient_is_orthogonal_to_every_row() -> None:
    """With rank = in and down = 1, up is the whole update, so its gradient is that of V: rows of V do not change their length."""
    for norm_grad in ("full", "detached"):
        model = made(width=12, out=14, rank=12, norm_grad=norm_grad)
        site = only_site(model)
        site.update.put(down=torch.eye(12, dtype=torch.float64))
        x, g = torch.randn(9, 12, dtype=torch.float64), torch.randn(9, 14, dtype=torch.float64)
        model(x).backward(g)
        of_v = site.update.up.grad / site.site.scaling  # (out, in)
        along = (adapted_weight(site) * of_v).sum(1).abs()
        if norm_grad == "full":
            assert (along < 1e-10).all()
            assert of_v.abs().max() > 0.1
        else:
            assert (along > 1e-3).any()


@pytest.mark.check("dora", 5)
@pytest.mark.parametrize("start", list(STARTS))
def test_rows_of_the_merged_weight_are_as_long_as_the_magnitude(start: str) -> None:
    model = made(torch.float32, 30, 18, **STARTS[start])
    site, x = only_site(model), torch.randn(5, 30)
    model.eval()
    wanted, magnitude = model(x).detach(), site.gain.saved()["magnitude"]
    assert (magnitude - adapted_weight(site).norm(dim=1).float()).abs().max() > 1e-3  # the magnitude has moved: the test can fail
    rw.merge(model)
    torch.testing.assert_close(site.base_layer.weight.norm(dim=1), magnitude.abs(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.check("dora", 6)
def test_scaling_a_row_of_base_and_update_changes_nothing() -> None:
    model = made()
    x, row = torch.randn(7, 20, dtype=torch.float64), 5
    wanted, site = model(x).detach(), only_site(model)
    base = one(20, 14, dtype=torch.float64)
    with torch.no_grad():
        base[0].weight[row] *= 3
    other = rw.adapt(base, dora(rank=4))
    up = site.update.up.detach().clone()
    up[row] *= 3
    only_site(other).update.put(down=site.update.down.detach(), up=up)
    before = other(x).detach()
    only_site(other).gain.restore(**site.gain.saved())
    torch.testing.assert_close(other(x), wanted, rtol=1e-12, atol=1e-12)
    assert (before - wanted)[:, row].abs().max() > 0.1  # with a magnitude of its own the row is longer


@pytest.mark.check("dora", 10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_magnitude_alone(dtype: torch.dtype) -> None:
    base = one(20, 14, dtype=dtype)
    x = torch.randn(5, 20, dtype=dtype)
    model = rw.adapt(copy.deepcopy(base), dora(update="none", init="own"))
    assert torch.equal(model(x), base(x))
    stir(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14
    weight, bias = base[0].weight, base[0].bias
    magnitude = only_site(model).gain.saved()["magnitude"]
    torch.testing.assert_close(model(x) - bias, magnitude / weight.norm(dim=1) * linear(x, weight), rtol=1e-5, atol=1e-6)
    y, g = model(x), torch.randn(5, 14, dtype=dtype)
    y.backward(g)
    torch.testing.assert_close(
        only_site(model).gain.magnitude.grad, (g * linear(x, weight)).sum(0) / weight.norm(dim=1), rtol=1e-4, atol=1e-5
    )


def test_a_row_of_zeros_has_gain_one_and_no_gradient() -> None:
    base = one(20, 14)
    with torch.no_grad():
        base[0].weight[3] = 0
    model = rw.adapt(base, dora(rank=4, norm_grad="full"))
    x = torch.randn(5, 20)
    y = model(x)
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    site = only_site(model)
    assert site.gain.magnitude.grad[3] == 0
    assert torch.isfinite(site.update.up.grad).all()
    assert torch.isfinite(site.update.down.grad).all()
