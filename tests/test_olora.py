"""OLoRA (Buyukakyuz 2024, arXiv 2406.01775): the start is the leading part of the QR decomposition.

There is no specification of it beside the project's others; these are its Checks:

1. fp64: scaling * up @ down is the product of the first r columns of Q and rows of R, which is Q_r Q_r^T W; what is left of W is
   orthogonal to Q_r and has rank min(out, in) - r. Tall, wide and square.
2. scaling * up has orthonormal columns and down is upper trapezoidal, for every alpha; alpha and rsLoRA leave the start as it is.
3. At the start the model is its base: bit for bit with base='keep' in fp32 and bf16, to rounding with base='fold'. The same seed or not
   makes no difference: nothing is drawn.
4. At scaling 1 the factors, the residual weight, the outputs and the first gradients are those of PEFT's OLoRA.
5. First gradients are dL/d up = s G (down x)^T and dL/d down = s up^T G x^T, both nonzero (LoRA's second one is zero).
6. After training: the stacked pair [down; down0], [up, -up0] on the pristine weight is the trained model, merged equals unmerged, and
   the base comes back; the start is scaled by `scaling` once, not twice (which is where PEFT's differs off scaling 1: noted by a test).
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_pissa import matrix
from tiny_models import dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import nn

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.sites import adapted_sites

SHAPES = [(24, 40), (40, 24), (32, 32)]
IDS = token_ids()


@pytest.mark.check("olora", 1)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_leading_part_of_the_qr_decomposition(shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape), 5
    q, r = torch.linalg.qr(weight)
    model = rw.adapt(one_linear(weight), rw.recipes.olora(rank=rank, alpha=7))
    start = site(model).update.factors().delta()  # type: ignore[union-attr]
    torch.testing.assert_close(start, q[:, :rank] @ r[:rank], rtol=0, atol=1e-12)
    torch.testing.assert_close(start, q[:, :rank] @ q[:, :rank].T @ weight, rtol=0, atol=1e-12)
    residual = weight - start
    assert (q[:, :rank].T @ residual).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(residual, atol=1e-10) == min(shape) - rank
    assert start.norm() > 0.1


@pytest.mark.check("olora", 2)
@pytest.mark.parametrize("fields", [{"alpha": 5}, {"alpha": 1}, {"alpha": 12}, {"alpha": 3, "scaling": "rslora"}, {}])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_up_and_trapezoidal_down_for_every_scaling(shape: tuple[int, int], fields: dict[str, Any]) -> None:
    weight, rank = matrix(*shape), 5
    module = site(rw.adapt(one_linear(weight), rw.recipes.olora(rank=rank, **fields)))
    update: Any = module.update
    scaled = module.site.scaling * update.up
    torch.testing.assert_close(scaled.T @ scaled, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(update.down, update.down.triu())
    q, r = torch.linalg.qr(weight)
    torch.testing.assert_close(update.factors().delta(), q[:, :rank] @ r[:rank], rtol=0, atol=1e-12)
    if not fields:
        assert module.site.scaling == 1.0


@pytest.mark.check("olora", 3)
def test_starts_at_the_base() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = logits(llama(dtype=dtype), IDS)
        kept = rw.adapt(llama(dtype=dtype), rw.recipes.olora(rank=4, alpha=10))
        assert torch.equal(logits(kept, IDS), before)
    before = logits(llama(), IDS)
    folded = rw.adapt(llama(), rw.recipes.olora(rank=4, alpha=10, base="fold"))
    torch.testing.assert_close(logits(folded, IDS), before, rtol=1e-5, atol=1e-5)
    one = rw.adapt(llama(), rw.recipes.olora(rank=4, seed=1))
    two = rw.adapt(llama(), rw.recipes.olora(rank=4, seed=2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def peft_olora(alpha: int, targets: list[str]) -> Any:
    return get_peft_model(llama(), LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="olora", target_modules=targets)).eval()


@pytest.mark.check("olora", 4)
def test_at_scaling_one_it_is_pefts() -> None:
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    theirs = peft_olora(4, targets)
    ours = rw.adapt(llama(), rw.recipes.olora(rank=4, targets=targets, base="fold"))
    kept = rw.adapt(llama(), rw.recipes.olora(rank=4, targets=targets))
    for model in (theirs, ours, kept):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, module in adapted_sites(ours).items():
        layer, update = theirs.base_model.model.get_submodule(name), module.update
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(update.down, down, rtol=0, atol=1e-6)  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(update.up, up, rtol=0, atol=1e-6)  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(module.weight, layer.base_layer.weight, rtol=0, atol=1e-6)
        for mine in (update, adapted_sites(kept)[name].update):
            torch.testing.assert_close(mine.down.grad, down.grad, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]
            torch.testing.assert_close(mine.up.grad, up.grad, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.check("olora", 5)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_first_gradients(base: str) -> None:
    weight = matrix(24, 40)
    model = rw.adapt(one_linear(weight), rw.recipes.olora(rank=5, alpha=7, base=base))
    update: Any = site(model).update
    x, g = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    model(x).backward(g)
    s = 7 / 5
    torch.testing.assert_close(update.up.grad, s * g.T @ (x @ update.down.detach().T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.down.grad, s * update.up.detach().T @ g.T @ x, rtol=1e-12, atol=1e-12)
    assert update.up.grad.abs().min() > 0
    assert update.down.grad.abs().min() > 0


@pytest.mark.check("olora", 6)
def test_the_trained_model_as_a_plain_pair_and_merged() -> None:
    weight = matrix(24, 40)
    model = perturb(rw.adapt(one_linear(weight), rw.recipes.olora(rank=5, alpha=7)), size=1.0)
    module = site(model)
    factors, offset = module.update.factors(), module.offset  # type: ignore[union-attr]
    plain = rw.adapt(one_linear(weight), rw.recipes.lora(rank=10, alpha=14))
    site(plain).update.put(  # type: ignore[union-attr]
        down=torch.cat([factors.down, offset.down]),  # type: ignore[union-attr]
        up=torch.cat([factors.up, -offset.up], dim=1),  # type: ignore[union-attr]
    )
    x = torch.randn(3, 40, dtype=torch.float64)
    expected = x @ dense_weight(module).T
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-12)
    assert (expected - x @ weight.T).abs().max() > 0.1
    rw.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    with rw.disabled(model):
        assert torch.equal(model(x), nn.functional.linear(x, weight))
    rw.unadapt(model)
    assert torch.equal(model.proj.weight, weight)  # type: ignore[union-attr]


@pytest.mark.check("olora", 6)
def test_off_scaling_one_peft_subtracts_another_product_than_it_adds() -> None:
    """PEFT keeps up = Q_r and subtracts `scaling` times the pair: also a start at the base, but of scaling times the part of W."""
    theirs, targets = peft_olora(8, ["q_proj"]), ["q_proj"]
    ours = rw.adapt(llama(), rw.recipes.olora(rank=4, alpha=8, targets=targets, base="fold"))
    name = "model.layers.0.self_attn.q_proj"
    layer, module = theirs.base_model.model.get_submodule(name), site(ours, name)
    weight = llama().get_submodule(name).weight.detach()
    part = module.update.factors().delta()  # type: ignore[union-attr]
    torch.testing.assert_close(weight - module.weight, part.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight - layer.base_layer.weight, 2 * part.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), rtol=1e-4, atol=1e-4)


def test_rank_above_a_side_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rank=25 at proj is larger than its smaller side 24"):
        rw.adapt(one_linear(matrix(24, 40)), rw.recipes.olora(rank=25))


def test_a_weight_of_lower_rank_than_asked_for_starts_at_the_base_and_trains() -> None:
    weight = torch.zeros(24, 40, dtype=torch.float64)
    weight[:, 7] = 1.0
    model = rw.adapt(one_linear(weight), rw.recipes.olora(rank=5))
    x = torch.randn(6, 40, dtype=torch.float64)
    assert torch.equal(model(x), nn.functional.linear(x, weight))
    model(x).backward(torch.randn(6, 24, dtype=torch.float64))
    assert (site(model).update.down.grad.norm(dim=1) > 0).all()  # type: ignore[union-attr]
