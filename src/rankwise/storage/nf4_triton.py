"""NF4 codes to a dense weight on a GPU in one launch, scales in 8 bits included.

    w[i] = table[code i] * (map[code8 b] * nested[b // 256] + offset),   b = i // blocksize

Each program reads a run of bytes, two codes each, and writes twice as many numbers; a scale is looked up beside the codes, so that no
tensor of scales is ever made and a weight costs one read of its codes and one write. The arithmetic is that of `nf4_codes`, in the same
order, products and sums each rounded by themselves: equal to the last bit. Needs Triton, which nothing else here does: imported by
`nf4_codes.dequantize_into` for tensors on a GPU, where Triton is installed.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from rankwise.eightbit import dynamic_map
from rankwise.errors import RecipeError
from rankwise.storage.nf4_codes import SUPERBLOCK, Codes, check_blocksize, nf4_table

BYTES = 1024  # codes a program reads
_NAMES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _to_bf16(x):
    """fp32 numbers rounded to the nearest that bf16 holds, ties to even; the interpreter's own conversion cuts the digits off."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # what is not a number stays so


@triton.jit
def _kernel(
    out,
    codes,
    absmax,
    nested_absmax,
    offset,
    table,
    levels,
    count,
    blocksize: tl.constexpr,
    superblock: tl.constexpr,
    nested: tl.constexpr,
    rounded: tl.constexpr,
    size: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = 2 * byte < count
    code = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    block = 2 * byte // blocksize  # both codes of a byte belong to one block
    if nested:
        level = tl.load(levels + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = level * tl.load(nested_absmax + block // superblock, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    first = tl.load(table + (code >> 4)) * scale
    second = tl.load(table + (code & 15)) * scale
    pair = tl.interleave(first, second)
    if rounded == tl.bfloat16:
        pair = _to_bf16(pair)
    elif rounded == tl.float16:
        pair = pair.to(tl.float16).to(tl.float32)
    if out.dtype.element_ty == tl.bfloat16:
        pair = _to_bf16(pair)
    element = 2 * tl.program_id(0).to(tl.int64) * size + tl.arange(0, 2 * size)
    tl.store(out + element, pair.to(out.dtype.element_ty), mask=element < count)


def dequantize_into(out: Tensor, held: Codes, blocksize: int, dtype: torch.dtype) -> Tensor:
    """What `nf4_codes.dequantize_into` does: the weight in a flat contiguous tensor (n,), made in fp32, rounded once to `dtype`.

    Raises:
        RecipeError: a form that the kernel does not read: other shapes, dtypes or devices than `quantize` gives, or a dtype that is not a
            floating-point type of 16 bits or more.
    """
    check_blocksize(blocksize)
    nested = held.nested_absmax is not None and held.offset is not None
    blocks = -(-out.numel() // blocksize)
    tensors = [tensor for tensor in held if tensor is not None]
    wanted = [((out.numel() + 1) // 2, torch.uint8), (blocks, torch.uint8 if nested else torch.float32)]
    wanted += [(-(-blocks // SUPERBLOCK), torch.float32), (1, torch.float32)] if nested else []
    fits = len(tensors) == len(wanted) and all(
        tensor.numel() == size and tensor.dtype == kind and tensor.is_contiguous() and tensor.device == out.device
        for tensor, (size, kind) in zip(tensors, wanted, strict=True)
    )
    if not fits or out.dim() != 1 or not out.is_contiguous() or out.dtype not in _NAMES or dtype not in _NAMES:
        raise RecipeError(
            f"codes of {[(tuple(t.shape), t.dtype, str(t.device)) for t in tensors]} into {tuple(out.shape)}, {out.dtype} on {out.device} "
            f"through {dtype} are not what the kernel reads; use nf4_codes.dequantize_into, or codes as nf4_codes.quantize gives them"
        )
    if out.numel():
        launch: Any = _kernel
        launch[(triton.cdiv(held.codes.numel(), BYTES),)](
            out,
            held.codes,
            held.absmax,
            held.nested_absmax if nested else held.absmax,
            held.offset if nested else held.absmax,
            nf4_table(out.device),
            dynamic_map(out.device),
            out.numel(),
            blocksize=blocksize,
            superblock=SUPERBLOCK,
            nested=nested,
            rounded=_NAMES[dtype],
            size=BYTES,
            enable_fp_fusion=False,  # a product and a sum in one rounding would be another number
        )
    return out
