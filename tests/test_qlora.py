"""QLoRA: codes and scales against bitsandbytes to the last bit, products against dense ones, and what a 4-bit base must not change."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from tiny_models import OneLinear, llama, logits, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import CheckpointError, RecipeError, TargetError
from rankwise.sites import adapted_sites
from rankwise.storage import NF4Linear, nf4_codes, storage_of
from rankwise.storage.bnb_layout import STATE, from_bitsandbytes_state, load_4bit, nf4_state_dict
from rankwise.storage.nf4_codes import Codes, bytes_of, dequantize, dynamic_map, nf4_table, quantize, scales_of
from rankwise.storage.workspace import free_workspaces, read_once

torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INPUTS = ("random", "zero blocks", "all zero", "outliers", "equal blocks")


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "random", seed: int = 0) -> Tensor:
    """A weight to quantize, (out, in)."""
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = weight.view(-1)
    if kind == "zero blocks":
        flat[: len(flat) // 2] = 0
    elif kind == "all zero":
        flat.zero_()
    elif kind == "outliers":
        flat[:: max(1, len(flat) // 5)] *= 1000
    elif kind == "equal blocks":
        weight = torch.full(shape, 0.5)
    return weight.to(dtype)


def theirs(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> tuple[Tensor, Any]:
    """(codes, quant_state) of bitsandbytes."""
    return bnb.functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")


def their_dense(codes: Tensor, state: Any) -> Tensor:
    """bitsandbytes' dequantization by its portable code; its AVX512 code is wrong where blocks cross rows (see the test of that)."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    return compute(codes.view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


# --- the table -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("qlora", 1)
def test_the_table_is_theirs_and_comes_from_quantiles() -> None:
    table = nf4_table(CPU)
    assert (table - _get_4bit_code("nf4", CPU)).abs().max() < 1e-8
    assert torch.equal(dynamic_map(CPU), bnb.functional.create_dynamic_map())
    # the recipe of the official code: 8 quantiles above zero, 7 below, and zero
    far = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(far, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(far, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(table.double(), levels / levels.max(), rtol=0, atol=1e-6)


# --- codes, scales and dense weights against bitsandbytes ------------------------------------------------------------------------------

SHAPES = [(64, 128), (48, 96), (7, 9), (1, 1), (63, 1), (300, 130), (9, 4099)]


@pytest.mark.check("qlora", 2)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_that_of_bitsandbytes(shape: tuple[int, int], kind: str) -> None:
    for dtype in DTYPES:
        for blocksize in (32, 64, 4096):
            weight = draw(shape, dtype, kind)
            for double_quant in (True, False):
                codes, state = theirs(weight, blocksize, double_quant)
                ours = quantize(weight, blocksize, double_quant)
                assert torch.equal(ours.codes, codes)
                assert torch.equal(ours.absmax, state.absmax)
                assert ours.absmax.dtype == state.absmax.dtype
                if double_quant:
                    assert ours.nested_absmax is not None
                    assert ours.offset is not None
                    assert torch.equal(ours.nested_absmax, state.state2.absmax)
                    assert torch.equal(ours.offset, state.offset)
                dense = dequantize(ours, shape, dtype, blocksize)
                assert torch.equal(dense, their_dense(codes, state).view(shape))
                assert bool(torch.isfinite(dense).all())
                if shape[1] % blocksize == 0:  # their native code is right here
                    assert torch.equal(dense, bnb.functional.dequantize_4bit(codes, state).view(shape))


@pytest.mark.check("qlora", 2)
def test_double_quantization_equals_theirs_on_many_scales() -> None:
    """Half a million scales: among so many some lie so near the middle of two levels that a plain nearest-level search would differ."""
    scales = torch.randn(500_000, generator=torch.Generator().manual_seed(1)).abs() * 0.3 + 2
    residual = scales - scales.mean()
    codes, state = bnb.functional.quantize_blockwise(residual, blocksize=256)
    ours, largest = nf4_codes._quantize_scales(residual)
    assert torch.equal(ours, codes)
    assert torch.equal(largest, state.absmax)
    levels = dynamic_map(CPU)
    plain = torch.bucketize(residual / largest.repeat_interleave(256)[: len(residual)], (levels[:-1] + levels[1:]) / 2)
    assert 0 < (plain != codes).sum() < 2000


def test_their_native_code_reads_wrong_scales_where_blocks_cross_rows() -> None:
    """Why `their_dense` is compared with: bitsandbytes 0.50.2 on AVX512 indexes the scales by row. Ours has the usual error everywhere."""
    weight = draw((64, 96))
    codes, state = theirs(weight, double_quant=False)
    ours = dequantize(quantize(weight, double_quant=False), (64, 96), torch.float32)
    assert (ours - weight).norm() < 0.1 * weight.norm()
    native = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(native, ours) or (native - weight).norm() > 0.2 * weight.norm()


@pytest.mark.check("qlora", 3)
@pytest.mark.parametrize("double_quant", [True, False])
def test_round_trip_error_is_half_a_gap_and_codes_are_idempotent(double_quant: bool) -> None:
    weight = draw((128, 256), kind="outliers")
    held = quantize(weight, double_quant=double_quant)
    dense = dequantize(held, (128, 256), torch.float32)
    table = nf4_table(CPU)
    half = float((table[1:] - table[:-1]).max()) / 2
    assert half == pytest.approx(0.152, abs=1e-3)
    absmax = weight.view(-1, 64).abs().amax(1)
    lost = (scales_of(held) - absmax).abs()  # what double quantization does to the scale
    assert (lost.max() == 0) == (not double_quant)
    error = (dense - weight).view(-1, 64).abs().amax(1)
    assert bool((error <= (half + 1e-6) * absmax + lost).all())
    again = quantize(dense, double_quant=double_quant)
    assert torch.equal(again.codes, held.codes)


@pytest.mark.check("qlora", 3)
def test_errors_on_normal_weights_are_the_measured_ones() -> None:
    weight = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for double_quant, error in ((True, 0.0920), (False, 0.09198)):
        dense = dequantize(quantize(weight, double_quant=double_quant), (1024, 1024), torch.float32)
        assert float((dense - weight).norm() / weight.norm()) == pytest.approx(error, abs=2e-4)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_of_several_pieces_is_made_dense_block_by_block(double_quant: bool) -> None:
    # pieces of 2^18 elements, the last one neither whole nor a whole number of blocks, of an odd number of elements
    weight = torch.randn(3, 200_001) * torch.linspace(0.1, 3, 3)[:, None]
    held = quantize(weight, double_quant=double_quant)
    codes = torch.stack([held.codes[:, 0] >> 4, held.codes[:, 0] & 15], 1).flatten()[: weight.numel()]
    wanted = nf4_table(weight.device)[codes.int()] * scales_of(held).repeat_interleave(64)[: weight.numel()]
    assert torch.equal(dequantize(held, tuple(weight.shape), torch.float32).flatten(), wanted)


def test_what_is_read_once_is_each_layers_own_weight() -> None:
    layers = [NF4Linear.from_weight(torch.randn(12, 20)) for _ in range(2)]
    x = torch.randn(3, 20)
    with read_once():
        for layer in (*layers, *layers):
            torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()))


@pytest.mark.check("qlora", 4)
def test_bits_per_parameter_from_the_buffers() -> None:
    layer = NF4Linear.from_weight(draw((1024, 1024)))
    size = sum(buffer.nbytes for buffer in layer.buffers())
    assert 8 * size / 1024**2 == pytest.approx(4.127, abs=1e-3)
    assert size == bytes_of(1024 * 1024)
    plain = NF4Linear.from_weight(draw((1024, 1024)), double_quant=False)
    assert 8 * sum(buffer.nbytes for buffer in plain.buffers()) / 1024**2 == 4.5
    for shape in SHAPES:
        for blocksize in (32, 64, 4096):
            for double_quant in (True, False):
                layer = NF4Linear.from_weight(draw(shape), blocksize=blocksize, double_quant=double_quant)
                assert sum(buffer.nbytes for buffer in layer.buffers()) == bytes_of(math.prod(shape), blocksize, double_quant)


@pytest.mark.check("qlora", 8)
def test_the_first_element_stands_in_the_high_half_of_a_byte() -> None:
    held = quantize(nf4_table(CPU).repeat(4)[None])
    assert held.codes.view(-1).tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    odd = quantize(torch.tensor([[1.0, -1.0, 0.5]]))
    assert odd.codes.shape == (2, 1)
    assert odd.codes[0].item() == 0xF0


# --- bitsandbytes' checkpoint layout ---------------------------------------------------------------------------------------------------


def linear4bit(weight: Tensor, bias: Tensor | None, double_quant: bool = True, storage: torch.dtype = torch.uint8) -> Any:
    """A quantized layer of bitsandbytes, in training mode: in evaluation it may repack its codes for the CPU."""
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias is not None, weight.dtype, double_quant, "nf4", quant_storage=storage, device="cpu"
    )
    layer.weight = bnb.nn.Params4bit(weight, False, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage, module=layer)
    layer.weight._quantize("cpu")
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer.train()


@pytest.mark.check("qlora", 5)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_state_dict_loads_in_theirs(dtype: torch.dtype, double_quant: bool) -> None:
    weight, bias = draw((40, 128), dtype), torch.randn(40).to(dtype)
    ours = NF4Linear.from_weight(weight, bias, double_quant=double_quant)
    state = nf4_state_dict(ours, "layer.")
    reference = linear4bit(weight, bias, double_quant).state_dict(prefix="layer.")
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[key], reference[key]) for key in state if not key.endswith(STATE))
    left, right = (json.loads(bytes(values[f"layer.weight.{STATE}"].tolist())) for values in (state, reference))
    assert left == right
    stats = {key.removeprefix("layer.weight."): value for key, value in state.items() if key.startswith("layer.weight.")}
    loaded = bnb.nn.Params4bit.from_prequantized(state["layer.weight"], stats, device="cpu")
    layer = bnb.nn.Linear4bit(128, 40, True, dtype, double_quant, "nf4", device="cpu").train()
    layer.weight, layer.bias = loaded, nn.Parameter(state["layer.bias"])
    x = torch.randn(3, 5, 128).to(dtype).requires_grad_()
    assert torch.equal(ours(x), layer(x))


@pytest.mark.check("qlora", 5)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_their_state_dict_loads_in_ours(storage: torch.dtype, double_quant: bool) -> None:
    weight, bias = draw((40, 128), torch.bfloat16), torch.randn(40).bfloat16()
    layer = linear4bit(weight, bias, double_quant, storage)
    x = torch.randn(3, 5, 128).bfloat16().requires_grad_()
    state = layer.state_dict(prefix="a.b.")
    ours = from_bitsandbytes_state(state, "a.b.")
    assert (ours.out_features, ours.in_features, ours.storage.recorded) == (40, 128, torch.bfloat16)
    assert torch.equal(ours(x), layer(x))
    assert torch.equal(ours.weight, NF4Linear.from_weight(weight, double_quant=double_quant).weight)


@pytest.mark.check("qlora", 5)
def test_a_whole_model_goes_through_the_layout() -> None:
    model, ids = rw.adapt(llama(), rw.recipes.qlora(rank=2)), token_ids()
    rw.unadapt(model)
    state = {key: tensor.clone() for key, tensor in nf4_state_dict(model).items()}
    assert "model.layers.0.mlp.up_proj.weight.nested_absmax" in state
    assert not any(key.endswith(".codes") for key in state)
    again = load_4bit(llama(seed=9), state)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert nf4_state_dict(again).keys() == state.keys()
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks \['model.norm.weight'\]"):
        load_4bit(llama(seed=9), state)


def damaged() -> Iterator[tuple[str, str, Tensor | None]]:
    yield "weight", "lacks weight", None
    yield "weight.absmax", "lacks weight.absmax", None
    yield "weight.nested_absmax", "lacks weight.nested_absmax", None
    yield f"weight.{STATE}", "is not an nf4 weight", None
    yield f"weight.{STATE}", "is not understood", torch.tensor(list(b"{}"), dtype=torch.uint8)
    yield "weight.quant_map", "table of levels", torch.linspace(-1, 1, 16)
    yield "weight.nested_quant_map", "table of levels", torch.linspace(-1, 1, 256)
    yield "weight", "do not fit 40 x 128", torch.zeros(17, 1, dtype=torch.uint8)


@pytest.mark.parametrize(("key", "message", "value"), list(damaged()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_layer_is_refused(key: str, message: str, value: Tensor | None) -> None:
    state = nf4_state_dict(NF4Linear.from_weight(draw((40, 128))))
    state = {name: tensor for name, tensor in state.items() if name != key} | ({} if value is None else {key: value})
    with pytest.raises(CheckpointError, match=message):
        from_bitsandbytes_state(state)


def test_fp64_has_no_place_in_the_layout() -> None:
    with pytest.raises(CheckpointError, match="float64"):
        nf4_state_dict(NF4Linear.from_weight(draw((4, 8)).double()))


# --- products --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("qlora", 6)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_layer(dtype: torch.dtype, bias: bool) -> None:
    """The same recipe over the dequantized weight as a dense base: every number equal, to the bit, as both run the same operation."""
    model = OneLinear(96, 40, bias, dtype)
    rw.adapt(model, rw.recipes.qlora(rank=4, dropout=0.0))
    quantized: Any = site(model).base_layer
    dense = OneLinear(96, 40, bias, dtype)
    dense.load_state_dict({"proj.weight": quantized.weight} | ({"proj.bias": quantized.bias} if bias else {}))
    rw.adapt(dense, rw.recipes.qlora(rank=4, dropout=0.0).replace(storage="keep"))
    perturb(model)
    perturb(dense)
    x = torch.randn(3, 5, 96, dtype=torch.float64).to(dtype)
    results = []
    for one in (model, dense):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(torch.ones_like(y) / 7)
        update: Any = site(one).update
        results.append((y.detach(), leaf.grad, update.down.grad, update.up.grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    weight = site(model).merged_weight().double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    wanted = F.linear(x.double(), weight, quantized.bias.double() if bias else None)
    torch.testing.assert_close(results[0][0].double(), wanted, rtol=tolerance, atol=tolerance)


def codes_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            for buffer in module.buffers():
                digest.update(buffer.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.check("qlora", 6)
def test_ten_steps_leave_the_codes_alone() -> None:
    model, ids = rw.adapt(llama(dtype=torch.bfloat16), rw.recipes.qlora(rank=4)), token_ids()
    before = codes_hash(model)
    optimizer = rw.optimizer(model, lr=1e-2, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert codes_hash(model) == before
    for module in model.modules():
        if isinstance(module, NF4Linear):
            assert not any(tensor.requires_grad or tensor.grad is not None for tensor in [*module.parameters(), *module.buffers()])


def test_the_operators_pass_torchs_own_checks() -> None:
    layer = NF4Linear.from_weight(draw((24, 40)), torch.randn(24))
    codes = [tensor for tensor in layer.held() if tensor is not None]
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.rankwise.nf4_product, (x, codes, layer.bias, 24, 64, torch.float32))
    torch.library.opcheck(torch.ops.rankwise.nf4_product_t, (torch.randn(2, 3, 24), codes, 40, 64, torch.float32))


def test_the_layer_is_differentiable_in_input_and_bias() -> None:
    layer = NF4Linear.from_weight(draw((6, 10)).double() * 50, torch.randn(6, dtype=torch.float64))
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.bias))


# --- memory ----------------------------------------------------------------------------------------------------------------------------


def large_allocations(call: Any, size: int) -> list[int]:
    """Bytes of each allocation on the CPU of at least `size` bytes while `call` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() >= size]


@pytest.mark.check("qlora", 7)
@pytest.mark.parametrize("gain", ["none", "dora"])
def test_many_layers_share_one_dense_weight(gain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_codes, "_AT_ONCE", 4096)
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).bfloat16()
    second = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh(), nn.Linear(512, 256, bias=False)).bfloat16()
    for module in (model, second):
        rw.adapt(module, rw.recipes.qlora(rank=2, gain=gain))
    free_workspaces()
    dense = 512 * 256 * 2
    x = torch.randn(4, 256).bfloat16().requires_grad_()

    def step(module: nn.Module) -> None:
        module(x).sum().backward()

    # the fp32 and index temporaries are pieces of 4096 elements, so whatever is as large as the weight is the weight
    assert large_allocations(lambda: step(model), dense // 2) == [dense]
    assert large_allocations(lambda: step(second), dense // 2) == []
    # the measurement can tell: a dense copy shows
    assert large_allocations(lambda: site(model, "0").base_layer.weight, dense // 2) == [dense]
    free_workspaces()


def count_fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from rankwise.storage import nf4

    filled: list[int] = []
    original = nf4.dequantize_into
    monkeypatch.setattr(nf4, "dequantize_into", lambda out, *rest: (filled.append(out.numel()), original(out, *rest))[1])
    return filled


def test_qdora_reads_the_weight_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row norm and the product share one dequantization; the backward needs another for the input's gradient."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)).bfloat16()
    plain = rw.adapt(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)).bfloat16(), rw.recipes.qlora(rank=2))
    rw.adapt(model, rw.recipes.qlora(rank=2, gain="dora", dropout=0.0))
    perturb(model)
    filled = count_fills(monkeypatch)
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    y = model(x)
    assert len(filled) == 2
    y.sum().backward()
    assert len(filled) == 4
    plain(x)
    assert len(filled) == 6
    # what is shared is right: the norm is that of the dense weight
    module = site(model, "0")
    gain: Any = module.gain
    torch.testing.assert_close(module.merged_weight().norm(dim=1), (gain.magnitude0 + gain.magnitude).detach().abs(), rtol=1e-2, atol=0)


def test_a_weight_loaded_into_a_layer_is_read_again() -> None:
    """The buffer is no cache across forwards: new codes show at once, also when they are written past any version counter."""
    layer = NF4Linear.from_weight(draw((8, 64)))
    x = torch.randn(2, 64)
    before = layer(x)
    layer.codes.data.copy_(NF4Linear.from_weight(draw((8, 64), seed=3)).codes)
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


# --- merging ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("qlora", 9)
def test_a_4_bit_weight_is_never_written_and_merging_gives_16_bits() -> None:
    model, ids = rw.adapt(llama(dtype=torch.bfloat16), rw.recipes.qlora(rank=4, alpha=16)), token_ids()
    base, on = logits(model, ids), logits(perturb(model), ids)
    name = "model.layers.0.mlp.up_proj"
    module = site(model, name)
    with pytest.raises(TargetError, match=r"cannot be written.*rankwise\.merge"):
        storage_of(module.base_layer).write(module.base_layer, module.merged_weight())
    rw.merge(model)
    assert all(type(one.base_layer) is nn.Linear and one.weight.dtype == torch.bfloat16 for one in adapted_sites(model).values())
    assert (logits(model, ids) - on).norm() < 0.02 * on.norm()
    assert (on - base).norm() > 0.1 * base.norm()
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), base)
    assert (logits(model, ids) - on).norm() < 0.02 * on.norm()
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), on)
    rw.merge(model, keep_base=False)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    assert type(model.get_submodule(name)) is nn.Linear
    assert (logits(model, ids) - on).norm() < 0.02 * on.norm()


@pytest.mark.check("qlora", 9)
def test_why_merging_into_4_bits_is_refused() -> None:
    """An update of 0.6% of the weight does not survive being rounded to 4 bits again."""
    weight = dequantize(quantize(draw((256, 256))), (256, 256), torch.float32)
    delta = draw((256, 8), seed=1) @ draw((8, 256), seed=2)
    delta *= 0.006 * weight.norm() / delta.norm()
    again = dequantize(quantize(weight + delta), (256, 256), torch.float32)
    assert (again - (weight + delta)).norm() > 0.9 * delta.norm()


# --- what is prepared ------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("qlora", 10)
def test_head_and_embeddings_stay_and_only_adapters_train() -> None:
    model = llama(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rw.adapt(model, rw.recipes.qlora(rank=4, targets=["q_proj", "v_proj"]))
    assert not isinstance(model.lm_head, NF4Linear)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        parameter = dict(model.named_parameters())[name]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])
    # all linear layers are held in 4 bits, adapted or not; none of their dense weights is left
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    assert isinstance(model.model.layers[1].self_attn.q_proj.base_layer, NF4Linear)
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    dense = {tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "update" not in name}
    assert dense == {(67, 32)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".update." in name for name in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.rankwise.plan.trained_parameters


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="blocksize=48"):
        rw.recipes.qlora(blocksize=48)
    with pytest.raises(RecipeError, match="iterations=0"):
        rw.recipes.lora(storage={"name": "nf4", "iterations": 0})
    with pytest.raises(RecipeError, match="iterations above 1 cannot be combined with base=keep"):
        rw.recipes.lora(storage={"name": "nf4", "iterations": 5})
    with pytest.raises(RecipeError, match="dtype="):
        NF4Linear(quantize(draw((2, 2))), 2, 2, dtype=torch.int8)
    recipe = rw.recipes.qlora(rank=8, blocksize=128, double_quant=False)
    assert rw.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Codes(*quantize(draw((2, 2)))).offset is not None
