"""Propulsion (Kowsher et al. 2024, arXiv 2409.10927): each output of the frozen layer is multiplied by a trained power.

There is no specification of it beside the project's others; these are its Checks:

1. z starts at 1, so that the model is its base bit for bit, in fp32, bf16 and fp64; out numbers train per site and nothing else.
2. y = z^k (W x) + bias, against a dense fp64 form, for several degrees, with and without bias; at a layer with a bias the paper's
   z^k (W x + bias) differs by (z^k - 1) bias, exactly; the plan says so.
3. Gradients are dL/dz = k z^(k-1) sum_t g (W x) and dL/dx = (g z^k) W, and finite differences agree.
4. Degree k at z is degree 1 at z^k; the degree is the gain in step size at the start: dL/dz is k times that of degree 1. z = 0 switches
   a row off, a negative z works, nothing is NaN; a degree below 1 is refused.
5. Per token only the pre-gain output is kept for the backward: no input, no projection.
6. Merged is diag(z^k) W with the bias untouched; merging, disabling and taking off give the base back bit for bit. On a bf16 base small
   steps of z are not lost: what is held is the distance from 1, in fp32.
"""

from typing import Any

import pytest
import torch
from tiny_models import OneLinear, activation_bytes, dense_weight, gpt2, llama, logits, perturb, saved_tensors, site, token_ids
from torch import Tensor

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.sites import adapted_sites

IDS = token_ids()


def moved(degree: int = 15, bias: bool = True, size: float = 0.2, **shape: Any) -> tuple[OneLinear, Any, Tensor]:
    """(model, its gain, z) with z away from 1."""
    model = rw.adapt(OneLinear(7, 6, bias=bias, **shape), rw.recipes.propulsion(degree=degree))
    gain: Any = site(model).gain
    with torch.no_grad():
        gain.z.copy_(torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * size)
    return model, gain, 1 + gain.z.detach()  # type: ignore[return-value]


@pytest.mark.check("propulsion", 1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_starts_at_the_base_and_trains_one_number_per_output(dtype: torch.dtype) -> None:
    before = logits(llama(dtype=dtype), IDS)
    model = rw.adapt(llama(dtype=dtype), rw.recipes.propulsion())
    assert torch.equal(logits(model, IDS), before)
    outputs = sum(module.out_features for module in adapted_sites(model).values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == outputs == rw.plan(llama(), rw.recipes.propulsion()).trained_parameters
    assert {name.rpartition(".")[2] for name in trained} == {"z"}
    gains: list[Any] = [module.gain for module in adapted_sites(model).values()]
    assert all(not gain.saved()["z"].any() for gain in gains)  # a file holds the distance from 1


@pytest.mark.check("propulsion", 2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 15])
def test_forward(degree: int, bias: bool) -> None:
    model, _, z = moved(degree, bias)
    layer = model.proj.base_layer
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    product = x @ layer.weight.T
    added = layer.bias if bias else torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(model(x), z**degree * product + added, rtol=1e-12, atol=1e-12)
    paper = z**degree * (product + added)
    torch.testing.assert_close(paper - model(x), ((z**degree - 1) * added).expand_as(paper), rtol=1e-9, atol=1e-11)
    notes = rw.plan(OneLinear(7, 6, bias=bias), rw.recipes.propulsion(degree=degree)).notes
    assert any("leaves biases out" in note for note in notes) == bias


@pytest.mark.check("propulsion", 3)
@pytest.mark.parametrize("degree", [1, 3, 15])
def test_gradients(degree: int) -> None:
    model, gain, z = moved(degree)
    weight = model.proj.base_layer.weight.detach()
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    model(x).backward(g)
    torch.testing.assert_close(gain.z.grad, degree * z ** (degree - 1) * (g * (x.detach() @ weight.T)).sum(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, (g * z**degree) @ weight, rtol=1e-11, atol=1e-12)

    def forward(x: Tensor, value: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"proj.gain.z": value}, (x,))

    assert torch.autograd.gradcheck(forward, (x, gain.z), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.check("propulsion", 4)
def test_the_degree_is_a_power_and_a_step_size() -> None:
    power, gain, z = moved(3)
    plain = rw.adapt(OneLinear(7, 6), rw.recipes.propulsion(degree=1))
    with torch.no_grad():
        site(plain).gain.z.copy_(z**3 - 1)  # type: ignore[union-attr, operator]
    x, g = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(power(x), plain(x), rtol=1e-12, atol=1e-12)
    gradients = []
    for degree in (1, 15):
        model = rw.adapt(OneLinear(7, 6), rw.recipes.propulsion(degree=degree))
        model(x).backward(g)
        gradients.append(site(model).gain.z.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[1], 15 * gradients[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        gain.z[0], gain.z[1] = -1.0, -1.5  # z = 0 and z = -0.5
    y = power(x)
    torch.testing.assert_close(y[:, 0], power.proj.base_layer.bias[0].expand(5), rtol=0, atol=1e-12)
    product = x @ power.proj.base_layer.weight.T
    torch.testing.assert_close(y[:, 1], -0.125 * product[:, 1] + power.proj.base_layer.bias[1], rtol=1e-12, atol=1e-12)
    y.backward(g)
    assert torch.isfinite(gain.z.grad).all()
    for degree in (0, -1):
        with pytest.raises(RecipeError, match=f"degree={degree} of the propulsion gain must be at least 1"):
            rw.recipes.propulsion(degree=degree)


@pytest.mark.check("propulsion", 5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_output_is_kept(dtype: torch.dtype) -> None:
    model, _, _ = moved(dtype=dtype)
    sizes = []
    for tokens in (10, 30):
        with saved_tensors() as saved:
            model(torch.randn(tokens, 7).to(dtype).requires_grad_())
        sizes.append(activation_bytes(saved, model))
    assert (sizes[1] - sizes[0]) / 20 == 6 * dtype.itemsize


@pytest.mark.check("propulsion", 6)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_the_way_back(make: Any) -> None:
    model = make()
    before, biases = logits(model, IDS), {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    rw.adapt(model, rw.recipes.propulsion())
    with torch.no_grad():
        for module in adapted_sites(model).values():
            module.gain.z.normal_(std=0.03)  # type: ignore[union-attr, operator]
    on = logits(model, IDS)
    assert (on - before).abs().max() > 0.1
    rows = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
    rw.merge(model)
    for name, module in adapted_sites(model).items():
        torch.testing.assert_close(module.storage.read(module.base_layer).double(), rows[name], rtol=1e-5, atol=1e-6)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name.endswith("bias")}
    assert all(torch.equal(after[name], value) for name, value in biases.items())
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-4, atol=1e-4)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), before)
    rw.unmerge(model)
    assert torch.equal(logits(model, IDS), on)
    rw.unadapt(model)
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.check("propulsion", 6)
def test_small_steps_survive_on_a_bf16_base() -> None:
    model = rw.adapt(OneLinear(7, 6, dtype=torch.bfloat16), rw.recipes.propulsion())
    gain: Any = site(model).gain
    assert gain.z.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):
            gain.z.add_(1e-5)  # 1 + 1e-5 is 1 in bf16, and loses three digits in fp32
    torch.testing.assert_close(gain.z, torch.full((6,), 1e-3), rtol=1e-5, atol=0)
    torch.testing.assert_close(site(model).gain(None, None, None, None), torch.full((6,), 1.001**15), rtol=1e-6, atol=0)  # type: ignore[misc]
    held = gain.z.detach().clone()
    saved = {name: value.clone() for name, value in gain.saved().items()}
    with torch.no_grad():
        gain.z.zero_()
    gain.restore(**saved)
    assert torch.equal(gain.z, held)  # to the last bit


def test_trains() -> None:
    model = rw.adapt(llama(), rw.recipes.propulsion())
    optimizer = rw.optimizer(model)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    perturb(model)
