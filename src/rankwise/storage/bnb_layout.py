"""bitsandbytes' layout of a 4-bit weight in a checkpoint, read and written without bitsandbytes.

For a layer at PATH:
    PATH.weight                                uint8 (n / 2, 1), or the same bytes under another dtype
    PATH.weight.absmax                         uint8 (blocks,) with double quantization, else fp32
    PATH.weight.quant_map                      fp32 (16,)
    PATH.weight.nested_absmax, nested_quant_map        fp32 (superblocks,) and (256,), with double quantization only
    PATH.weight.quant_state.bitsandbytes__nf4  uint8, the bytes of a JSON object: dtype, shape, block sizes, offset
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import CheckpointError, TargetError
from rankwise.storage.nf4 import NF4Linear
from rankwise.storage.nf4_codes import BLOCKSIZES, SUPERBLOCK, Codes, dynamic_map, nf4_table

STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def nf4_state_dict(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of an NF4Linear, or of a model that holds some: those in bitsandbytes' layout, all else as `state_dict` has it.

    Raises:
        CheckpointError: a layer that is rounded to fp64, which the layout does not know.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, NF4Linear)}
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        parent, _, last = key.rpartition(".")
        if parent not in layers or last == "bias":
            state[prefix + key] = tensor
    for name, layer in layers.items():
        path = f"{prefix}{name}.weight" if name else f"{prefix}weight"
        state |= {f"{path}.{key}" if key else path: tensor for key, tensor in _entries(layer, path).items()}
    return state


def _entries(layer: NF4Linear, path: str) -> dict[str, Tensor]:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if layer.storage.recorded not in names:
        raise CheckpointError(f"{path} is rounded to {layer.storage.recorded}, which bitsandbytes' layout does not have; use fp32 or less")
    held, device = layer.held(), layer.codes.device
    about: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": layer.storage.blocksize,
        "dtype": names[layer.storage.recorded],
        "shape": [layer.out_features, layer.in_features],
    }
    entries = {"": held.codes, "absmax": held.absmax, "quant_map": nf4_table(device).clone()}
    if held.nested_absmax is not None and held.offset is not None:
        about |= {"nested_blocksize": SUPERBLOCK, "nested_dtype": "float32", "nested_offset": held.offset.item()}
        entries |= {"nested_absmax": held.nested_absmax, "nested_quant_map": dynamic_map(device).clone()}
    entries[STATE] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device=device)
    return entries


def from_bitsandbytes_state(state: Mapping[str, Tensor], prefix: str = "") -> NF4Linear:
    """The NF4Linear of one layer of a checkpoint.

    Args:
        state: tensors by key; keys that do not begin with `prefix` + 'weight' or are not its bias are left alone.
        prefix: the layer's path with a dot at its end.

    Raises:
        CheckpointError: no such layer, FP4 or another format, missing parts, a table or shapes that do not fit.
    """
    path = f"{prefix}weight"
    if f"{path}.{STATE}" not in state:
        raise CheckpointError(f"the state holds no {path}.{STATE}: {path} is not an nf4 weight of bitsandbytes")
    try:
        about = json.loads(bytes(state[f"{path}.{STATE}"].tolist()))
        dtype, (rows, columns) = _DTYPES[about["dtype"]], about["shape"]
        blocksize, nested = about["blocksize"], "nested_offset" in about
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}.{STATE} is not understood ({error!r}); write it with bitsandbytes again") from error

    def part(name: str) -> Tensor:
        key = f"{path}.{name}" if name else path
        if key not in state:
            raise CheckpointError(f"the state lacks {key}; copy or save the checkpoint again")
        return state[key]

    packed = part("")
    codes = packed.contiguous().view(torch.uint8).view(-1, 1)  # possibly packed as bf16, for sharding
    blocks = -(-rows * columns // blocksize) if blocksize in BLOCKSIZES else -1
    absmax = part("absmax")
    if blocks < 0 or codes.numel() != (rows * columns + 1) // 2 or absmax.numel() != blocks:
        raise CheckpointError(f"{path}: {codes.numel()} bytes and {absmax.numel()} scales do not fit {rows} x {columns} in {blocksize}")
    _same_table(path, part("quant_map"), nf4_table(codes.device))
    held = Codes(codes, absmax)
    if nested:
        if about.get("nested_blocksize") != SUPERBLOCK or part("nested_absmax").numel() != -(-blocks // SUPERBLOCK):
            raise CheckpointError(f"{path}: nested_blocksize={about.get('nested_blocksize')!r} must be {SUPERBLOCK} and fit the scales")
        _same_table(path, part("nested_quant_map"), dynamic_map(codes.device))
        offset = torch.tensor(about["nested_offset"], dtype=torch.float32, device=codes.device)
        held = Codes(codes, absmax, part("nested_absmax").float(), offset)
    return NF4Linear(held, columns, rows, state.get(f"{prefix}bias"), blocksize, dtype)


def _same_table(path: str, given: Tensor, ours: Tensor) -> None:
    if given.shape != ours.shape or not torch.allclose(given.to(ours), ours, rtol=0, atol=1e-6):
        raise CheckpointError(f"{path}: its table of levels is not that of nf4 with double quantization; quantize the weight again")


def load_4bit(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a 4-bit checkpoint into a model of dense layers, in place: linear layers whose weight is in 4 bits become NF4Linear.

    Raises:
        CheckpointError: as `from_bitsandbytes_state`, or keys that are missing or unexpected.
    """
    ending = f".weight.{STATE}"
    layers = {key.removesuffix(ending): None for key in state if key.endswith(ending)}
    made = {name: from_bitsandbytes_state(state, f"{name}.") for name in layers}
    modules = dict(model.named_modules())
    for name in made:
        if name not in modules:
            raise CheckpointError(f"the state holds {name}.weight, and the model has no {name}; build the model from the same config")
    inside = tuple(f"{name}." for name in made)
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(inside)}
    for name, layer in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(modules[name].training).to(next(modules[name].parameters()).device))
    missing, unexpected = model.load_state_dict(rest, strict=False)
    own = model.state_dict(keep_vars=True)
    # tied weights stand in a checkpoint once: what another key has loaded is not missing
    loaded = {id(own[key]) for key in rest if key in own}
    lacking = [key for key in missing if not key.startswith(inside) and id(own[key]) not in loaded]
    if lacking or unexpected:
        raise CheckpointError(f"the state lacks {lacking[:3]} and has {unexpected[:3]} that the model does not know; use the same config")
    return model


def is_bitsandbytes_4bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear4bit, quantized; recognised without importing it."""
    if not any(kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__):
        return False
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def as_nf4(layer: Any) -> NF4Linear:
    """An NF4Linear with the codes of a quantized Linear4bit; nothing is rounded.

    Raises:
        TargetError: FP4 codes, or codes that bitsandbytes has repacked for this CPU.
        CheckpointError: as `from_bitsandbytes_state`.
    """
    quant_state = layer.weight.quant_state
    if quant_state.quant_type != "nf4":
        raise TargetError(f"a Linear4bit with quant_type={quant_state.quant_type!r} is not nf4; load the base in nf4 or in 16 bit")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise TargetError("bitsandbytes has repacked a Linear4bit for this CPU and rounded its scales; load the base again before using it")
    state = {"weight": layer.weight.data} | {f"weight.{key}": value for key, value in quant_state.as_dict(packed=True).items()}
    if layer.bias is not None:
        state["bias"] = layer.bias.detach()
    return from_bitsandbytes_state(state).train(layer.training)
