"""NF4: weights as 4-bit codes of a fixed table, scaled by block; the scales themselves as 8-bit codes (double quantization).

    w = table[code] * absmax[block],        absmax = map[code8] * nested_absmax[superblock] + offset

Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3; the table is that of the official code (the paper's equation 4 gives another
one). Blocks run over the flattened weight, row by row, 64 elements each, superblocks over 256 scales. Two codes to a byte, the first in
the high half. Every number is what bitsandbytes computes on a CPU, to the last bit, so that both read each other's checkpoints alike.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.eightbit import Bins, bins_of, dynamic_map, nearest
from rankwise.errors import RecipeError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SUPERBLOCK = 256  # scales to one fp32 number
_TINY = 1e-38  # stands for the largest element of a block of zeros
_BINS = 65536
# elements dequantized at once: bounds the fp32 temporaries, which on a CPU stay in the cache
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1 << 18, 1 << 24

NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Codes(NamedTuple):
    """A weight of n elements in 4 bits."""

    codes: Tensor  # (ceil(n / 2), 1) uint8
    absmax: Tensor  # (blocks,) uint8 with double quantization, else fp32
    nested_absmax: Tensor | None = None  # (superblocks,) fp32
    offset: Tensor | None = None  # () fp32, the mean of the scales


@cache
def nf4_table(device: torch.device) -> Tensor:
    """The 16 levels, (16,) fp32, ascending."""
    return torch.tensor(NF4_TABLE, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) int64: the bits of the two fp32 levels that a byte stands for, so that one look-up of 8 bytes serves both."""
    table, byte = nf4_table(device), torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).view(torch.int64).view(-1)


@cache
def _nf4_bins(device: torch.device) -> Bins:
    return bins_of(nf4_table(device))


@cache
def _bins(device: torch.device) -> Tensor:
    """(65536,) uint8: the nearest level of the dynamic map to each of as many evenly spaced numbers in [-1, 1].

    Scales are rounded to these before the nearest level is looked up, as bitsandbytes does on a CPU: near the middle of two levels the
    result is another than that of a search without rounding.
    """
    levels = dynamic_map(device)
    grid = -1 + (2.0 * torch.arange(_BINS, dtype=torch.float32, device=device)) / (_BINS - 1)
    return torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@torch.no_grad()
def quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> Codes:
    """The NF4 form of a tensor of any shape and floating-point dtype.

    Raises:
        RecipeError: an unknown block size.
    """
    check_blocksize(blocksize)
    flat = weight.reshape(-1).float()
    full = len(flat) - len(flat) % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp_min(_TINY))[:, None]).view(-1)
    if full < len(flat):  # the last, shorter block
        last = flat[full:].abs().amax().clamp_min(_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[full:] / last])
    scaled = F.pad(scaled.clamp_(-1, 1), (0, len(scaled) % 2))
    code = nearest(scaled, _nf4_bins(weight.device))
    codes = (code[::2] << 4 | code[1::2])[:, None]
    if not double_quant:
        return Codes(codes, absmax)
    offset = absmax.mean()
    return Codes(codes, *_quantize_scales(absmax - offset), offset)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes, fp32 largest element of each superblock)."""
    blocks = F.pad(scales, (0, -len(scales) % SUPERBLOCK)).view(-1, SUPERBLOCK)
    largest = blocks.abs().amax(1)
    normed = (blocks * torch.where(largest > 0, 1.0 / largest, 0.0)[:, None]).clamp_(-1, 1)
    codes = _bins(scales.device)[((normed + 1) * 0.5 * (_BINS - 1) + 0.5).int()]
    codes = torch.where(largest[:, None] > 0, codes, 0)  # all equal scales: any level times zero is zero
    return codes.view(-1)[: len(scales)], largest


def scales_of(held: Codes) -> Tensor:
    """The scale of each block, (blocks,) fp32."""
    if held.nested_absmax is None or held.offset is None:
        return held.absmax
    levels = dynamic_map(held.absmax.device).index_select(0, held.absmax.int())
    blocks = F.pad(levels, (0, -len(levels) % SUPERBLOCK)).view(-1, SUPERBLOCK)
    return blocks.mul(held.nested_absmax[:, None]).add_(held.offset).view(-1)[: len(levels)]


@cache
def _kernel() -> "Callable[[Tensor, Codes, int, torch.dtype], Tensor] | None":
    """The same in one launch, where Triton is installed."""
    try:
        from rankwise.storage.nf4_triton import dequantize_into
    except ImportError:
        return None
    return dequantize_into


@torch.no_grad()
def dequantize_into(out: Tensor, held: Codes, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Writes the weight into a flat contiguous tensor (n,) of any floating-point dtype; made in fp32, rounded once to `dtype`.

    Nothing of the weight's size is allocated: the fp32 numbers between stand in one piece that is used again and again.
    """
    if out.is_cuda and (kernel := _kernel()) is not None:
        return kernel(out, held, blocksize, dtype)
    scales, pairs, n = scales_of(held), _pairs(held.codes.device), len(out)
    flat, piece = held.codes.view(-1), _AT_ONCE if out.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    room = min(piece, n + n % 2) // 2
    index, memory = flat.new_empty(room, dtype=torch.int32), pairs.new_empty(room)
    for begin in range(0, n, piece):
        end = min(begin + piece, n)
        codes = flat[begin // 2 : (end + 1) // 2]
        byte, looked_up = index[: len(codes)].copy_(codes), memory[: len(codes)]
        torch.index_select(pairs, 0, byte, out=looked_up)
        values = looked_up.view(torch.float32)[: end - begin]
        full = (end - begin) // blocksize * blocksize
        first = begin // blocksize
        values[:full].view(-1, blocksize).mul_(scales[first : first + full // blocksize, None])
        if full < end - begin:
            values[full:].mul_(scales[-1])
        out[begin:end].copy_(values if dtype in (out.dtype, torch.float32) else values.to(dtype))
    return out


def dequantize(held: Codes, shape: tuple[int, ...], dtype: torch.dtype, blocksize: int = 64) -> Tensor:
    """The weight as a new dense tensor."""
    out = torch.empty(shape, dtype=dtype, device=held.codes.device)
    dequantize_into(out.view(-1), held, blocksize, dtype)
    return out


def bytes_of(numel: int, blocksize: int = 64, double_quant: bool = True) -> int:
    """Bytes of the NF4 form of so many elements: 4.127 bits an element with double quantization, 4.5 without."""
    blocks = -(-numel // blocksize)
    return (numel + 1) // 2 + (blocks + 4 * -(-blocks // SUPERBLOCK) + 4 if double_quant else 4 * blocks)


def check_blocksize(blocksize: int) -> None:
    """Raises RecipeError for a block size that the format does not have."""
    if blocksize not in BLOCKSIZES:
        raise RecipeError(f"blocksize={blocksize!r} of nf4 is unknown; use one of {', '.join(map(str, BLOCKSIZES))}")
