"""A LoRA as a GGUF file for llama.cpp, and back, so that what was written can be proven.

    blk.N.attn_q.weight.lora_a (rank, in),   blk.N.attn_q.weight.lora_b (out, rank),   adapter.lora.alpha = rank

llama.cpp adds alpha / rank * b (a x) and takes the rank from each tensor, so alpha = rank is a scale of 1. Its `llama` architecture rotates
neighbouring pairs of a head where Hugging Face rotates its halves; the rows of q and k are therefore reordered in converted bases, and so
must the rows of their lora_b be: row (h, half, i) goes to (h, i, half). Names come from the package `gguf`. Format as read by llama.cpp's
src/llama-adapter.cpp.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import CheckpointError

FILE = "adapter.gguf"
#: class of the model -> (name of gguf's architecture, whether its rows of q and k are reordered)
ARCHITECTURES = {
    "LlamaForCausalLM": ("LLAMA", True),
    "MistralForCausalLM": ("LLAMA", True),
    "Qwen2ForCausalLM": ("QWEN2", False),
    "Qwen3ForCausalLM": ("QWEN3", False),
    "GemmaForCausalLM": ("GEMMA", False),
    "Gemma2ForCausalLM": ("GEMMA2", False),
    "Gemma3ForCausalLM": ("GEMMA3", False),
}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise CheckpointError(
            "a GGUF file needs the package gguf, which is not installed; get it: pip install 'rankwise[export]'"
        ) from None
    return gguf


def _architecture(model: Any) -> tuple[Any, bool]:
    name = type(getattr(model, "_orig_mod", model)).__name__
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{name} has no LoRA in GGUF here; {', '.join(ARCHITECTURES)} have one. Export it merged and convert the folder with llama.cpp"
        )
    arch, reordered = ARCHITECTURES[name]
    return getattr(_gguf().MODEL_ARCH, arch), reordered


def names_of(model: Any, sites: Mapping[str, Any]) -> dict[str, str]:
    """Site name -> the name of its weight in llama.cpp.

    Raises:
        CheckpointError: an architecture or a layer that llama.cpp has no name for, or an output head tied to the embedding, which it does
            not hold as a tensor of its own.
    """
    gguf = _gguf()
    arch, _ = _architecture(model)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    found: dict[str, str] = {}
    for site in sites:
        name = table.get_name(f"{site}.weight", try_suffixes=(".weight",))
        if name is None:
            raise CheckpointError(
                f"{site} has no name in llama.cpp's architecture {gguf.MODEL_ARCH_NAMES[arch]!r}; leave it out of the targets"
            )
        if tied and name.startswith("output."):
            raise CheckpointError(
                f"{site} is tied to the embedding, and llama.cpp holds no tensor of its own for it; leave it out of the targets"
            )
        found[site] = name
    return found


def reordered(up: Tensor, heads: int, back: bool = False) -> Tensor:
    """The rows of q's or k's lora_b (heads * width, rank) from halves of a head to neighbouring pairs, or back.

    Row h * width + half * width / 2 + i  <->  h * width + 2 i + half.
    """
    rows, rank = up.shape
    shape = (heads, rows // heads // 2, 2, rank) if back else (heads, 2, rows // heads // 2, rank)
    return up.reshape(shape).transpose(1, 2).reshape(rows, rank)


def _heads(model: Any, name: str) -> int | None:
    """Heads of a weight whose rows are reordered, or None."""
    if not _architecture(model)[1]:
        return None
    config = model.config
    if name.endswith(".attn_q.weight"):
        return config.num_attention_heads
    if name.endswith(".attn_k.weight"):
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return None


def write_gguf(path: Path, model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Writes pairs of one rank and one dtype.

    Args:
        path: the file.
        model: the base, for its architecture.
        pairs: site name -> (lora_A (rank, in), lora_B (out, rank)), every scale multiplied in.

    Raises:
        CheckpointError: as `names_of`.
    """
    gguf = _gguf()
    names = names_of(model, pairs)
    arch, _ = _architecture(model)
    dtype = next(iter(pairs.values()))[0].dtype
    kind = getattr(gguf.GGMLQuantizationType, _TYPES[dtype])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(len(next(iter(pairs.values()))[0])))
    writer.add_file_type(getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(_TYPES[dtype], f"MOSTLY_{_TYPES[dtype]}")))
    for site, (down, up) in pairs.items():
        heads = _heads(model, names[site])
        up = up if heads is None else reordered(up, heads)
        for suffix, tensor in (("lora_a", down), ("lora_b", up)):
            values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(f"{names[site]}.{suffix}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(field -> value, tensor -> fp32 values). What the package says of a broken file is of many kinds, and becomes an error of ours."""
    gguf = _gguf()

    class Reader(gguf.GGUFReader):  # the package's own reads past the end, where a forged length keeps it for hours
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **orders: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before what it announces")
            return super()._get(int(offset), dtype, int(count), *order, **orders)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            tensors[tensor.name] = values.reshape(tuple(int(size) for size in tensor.shape[::-1]))
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file ({error!r:.200}); write it again") from error
    return fields, tensors


def read_gguf(path: Path, model: Any, sites: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Site name -> (lora_A, lora_B times the file's scale), fp32, in the order of Hugging Face's rows.

    Raises:
        CheckpointError: it is no LoRA of this architecture, or holds other tensors than those of the sites.
    """
    gguf = _gguf()
    arch, _ = _architecture(model)
    fields, tensors = _contents(path)
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": gguf.MODEL_ARCH_NAMES[arch]}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise CheckpointError(f"{path}: {key} is {fields.get(key)!r}, and must be {value!r}")
    alpha = fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: adapter.lora.alpha is {alpha!r}, and must be a number")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site, name in names_of(model, sites).items():
        try:
            down, up = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}") from None
        heads = _heads(model, name)
        if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1] or not len(down) or len(up) % (2 * (heads or 1)) * bool(heads):
            raise CheckpointError(f"{path}: {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, which are no pair of this model")
        scale = alpha / up.shape[1] if alpha else 1.0  # as llama.cpp does
        found[site] = (down, scale * (up if heads is None else reordered(up, heads, back=True)))
    if tensors:
        raise CheckpointError(f"{path} holds {len(tensors)} tensors of no site, such as {next(iter(tensors))}")
    return found
