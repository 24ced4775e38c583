"""16-bit weights multiplied in fp32: the products, every kind of update over them, and what stays as it was."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from method_checks import resumes_bit_for_bit
from tiny_models import llama, token_ids
from torch import Tensor, nn
from training_models import make_world

import rankwise as rw
from rankwise.storage import WideLinear, storage_of, wide, widening
from rankwise.storage.wide import WIDE
from rankwise.training.models import load_model

NARROW = (torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@given(
    st.sampled_from(NARROW),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_a_product_is_the_exact_one_rounded_once(
    dtype: torch.dtype, batch: int, length: int, width: int, out: int, biased: bool, piece: int
) -> None:
    """Against fp64 products of the same 16-bit numbers, in pieces of any size: within the rounding of the result and of fp32 sums."""
    x, g = drawn(batch, length, width, seed=1, dtype=dtype), drawn(batch, length, out, seed=2, dtype=dtype)
    weight, bias = drawn(out, width, seed=3, dtype=dtype), drawn(out, seed=4, dtype=dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide, "_PIECE", piece)
        patch.setattr(widening, "_FROM_ROWS", 1)
        y, dx = WIDE.product(x, bias, weight), WIDE.product_t(g, weight)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for found, exact in ((y, wanted), (dx, g.double() @ weight.double())):
        assert found.dtype == dtype
        assert found.shape == exact.shape
        step = torch.finfo(dtype).eps * exact.abs() / 2  # half a unit of the result, and the sums of fp32
        assert bool(((found.double() - exact).abs() <= step * 1.01 + 1e-5).all())


def test_few_rows_other_dtypes_and_trained_weights_take_the_layers_own_products() -> None:
    layer = rw.fp32_products(nn.Linear(24, 16, dtype=torch.bfloat16).requires_grad_(False))
    assert type(layer) is WideLinear
    few, many = drawn(31, 24, seed=1, dtype=torch.bfloat16), drawn(32, 24, seed=1, dtype=torch.bfloat16)
    assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))
    assert storage_of(layer).wider(few, layer.weight) is None
    assert storage_of(layer).wider(many, layer.weight) is torch.float32
    assert storage_of(layer).wider(many.float(), layer.weight) is None
    layer.float()
    assert torch.equal(layer(many.float()), F.linear(many.float(), layer.weight, layer.bias))
    layer.bfloat16().requires_grad_(True)
    x = many.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert type(rw.fp32_products(nn.Linear(24, 16))) is nn.Linear


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A batch of enough tokens, cut into many pieces of weight."""
    monkeypatch.setattr(wide, "_PIECE", 300)
    return token_ids(4, 12)


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name].double() - want.double()).square().sum()) for name, want in wanted.items())
    return (difference / sum(float(want.double().square().sum()) for want in wanted.values())) ** 0.5


def batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


METHODS = ("lora", "dora", "moslora", "adalora", "pissa", "vera", "loramoe", "am_lora", "lora_fa", "randlora", "qlora")


def adapted(method: str, dtype: torch.dtype) -> nn.Module:
    """With every trained tensor away from zero."""
    options: dict[str, Any] = {"vera": {"rank": 64}, "lora": {"rank": 2, "dropout": 0.1}}.get(method, {"rank": 2})
    torch.manual_seed(0)
    return moved(rw.adapt(llama(dtype=dtype), getattr(rw.recipes, method)(targets="all-linear", **options)).train())


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_update_trains_over_wide_products_as_over_the_layers_own(method: str, ids: Tensor) -> None:
    """Both against fp32 weights of the same values; the wide ones are no further from them, up to a margin for chance."""
    model = adapted(method, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    wanted, own = gradients(exact, batch(ids)), gradients(model, batch(ids))
    fast = gradients(rw.fp32_products(model), batch(ids))
    assert fast[0] == pytest.approx(wanted[0], rel=3e-3)
    assert apart(fast[1], wanted[1]) <= 1.25 * apart(own[1], wanted[1])
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    again = gradients(checkpointed, batch(ids))
    assert again[0] == fast[0]
    assert all(torch.equal(again[1][name], fast[1][name]) for name in fast[1])


def test_autocast_changes_nothing(ids: Tensor) -> None:
    """Also not where the backward runs inside of it."""
    model = rw.fp32_products(adapted("lora", torch.bfloat16).eval())
    plain = gradients(model, batch(ids))
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(model, batch(ids))
    assert inside[0] == pytest.approx(plain[0], rel=2e-3)
    assert apart(inside[1], plain[1]) < 0.02


@pytest.mark.parametrize("method", ["lora", "vera", "am_lora"])
def test_an_fp32_input_under_autocast_is_narrowed_as_the_layer_does_it(method: str) -> None:
    """At its start a site gives its base's very bits there too, in 16 bits."""
    base = rw.fp32_products(llama(dtype=torch.bfloat16))
    layer = base.model.layers[0].mlp.gate_proj  # type: ignore[union-attr]
    x = drawn(40, 32, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        model = rw.adapt(base, getattr(rw.recipes, method)(rank=2, targets=["gate_proj"]))
        found = model.model.layers[0].mlp.gate_proj(x)  # type: ignore[union-attr]
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    slopes = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, wanted)]
    assert relative(*slopes) < 0.01


@pytest.mark.parametrize("before", [True, False])
def test_the_promises_hold_over_the_model_as_it_is_then(before: bool, ids: Tensor) -> None:
    base = rw.fp32_products(llama(dtype=torch.bfloat16))
    wanted = base(ids).logits
    model = llama(dtype=torch.bfloat16)
    own = model(ids).logits
    keys = list(model.state_dict())
    model = rw.adapt(rw.fp32_products(model) if before else model, rw.recipes.lora(rank=2, targets="all-linear"))
    rw.fp32_products(model)
    assert any(type(module) is WideLinear for module in model.modules())
    assert torch.equal(model(ids).logits, wanted)  # at its start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)
    assert not torch.equal(model(ids).logits, wanted)
    with rw.disabled(model):
        assert torch.equal(model(ids).logits, wanted)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    trained = model(ids).logits
    rw.merge(model)
    assert relative(model(ids).logits.detach(), trained.detach()) < 0.02
    rw.unmerge(model)
    assert torch.equal(model(ids).logits, trained)
    plain = rw.unadapt(model)
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain(ids).logits, wanted)
    rw.native_products(plain)
    assert all(type(module) is not WideLinear for module in plain.modules())
    assert torch.equal(plain(ids).logits, own)


def test_the_fused_loss_takes_the_heads_products(ids: Tensor) -> None:
    model = rw.fp32_products(adapted("lora", torch.bfloat16).eval())
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    plain = gradients(model, batch(ids))
    fused = gradients(rw.fuse_loss(model), batch(ids))
    assert fused[0] == pytest.approx(plain[0], rel=1e-4)
    assert apart(fused[1], plain[1]) < 0.02


def test_nothing_wide_is_kept_for_the_backward(ids: Tensor) -> None:
    """Of a site x stands in 16 bits; only rank-sized tensors are wide."""
    model = rw.fp32_products(rw.adapt(llama(dtype=torch.bfloat16), rw.recipes.lora(rank=2, targets="all-linear"))).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []
    layer = model.model.layers[0].mlp.gate_proj  # type: ignore[union-attr]
    x = drawn(40, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    mine = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert {(tensor.dtype, tensor.numel()) for tensor in mine} == {(torch.bfloat16, x.numel()), (torch.float32, 40 * 2)}


@pytest.mark.parametrize("pays", [True, False])
def test_a_bf16_run_multiplies_so_where_it_pays_says_so_and_resumes_bit_for_bit(
    pays: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "_FROM_ROWS", 1)
    monkeypatch.setattr("rankwise.storage.fp32_products_pay", lambda dtype: pays)
    loaded = load_model(str(world / "llama"), "completion", dtype=torch.bfloat16)
    assert any(type(module) is WideLinear for module in loaded.model.modules()) == pays
    assert any("multiplied in fp32" in note for note in loaded.notes) == pays
    widened: list[bool] = []
    plain = wide.Wide.product
    monkeypatch.setattr(wide.Wide, "product", lambda self, *args: widened.append(True) or plain(self, *args))
    resumes_bit_for_bit(world, tmp_path, monkeypatch, {"name": "lora"}, train={"lr": 1e-2, "precision": "bf16"})
    assert bool(widened) == pays


def test_whether_they_pay_is_decided_once_a_process() -> None:
    assert rw.fp32_products_pay() is rw.fp32_products_pay()
