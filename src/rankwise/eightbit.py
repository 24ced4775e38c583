"""Optimizer moments in 8 bits: each element as the nearest of 256 levels, times the largest element of its block.

    m ~ level[code] * absmax[block],     blocks of 256 elements of the flattened tensor, absmax in fp32

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2. The levels are dynamic: seven decades,
each with twice as many levels as the one below; with a sign for first moments, without for second ones. The levels are those of
bitsandbytes to the last bit, and every code is the nearest level. A tensor of n elements takes n + 4 ceil(n / 256) bytes.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
SMALL = 4096  # a moment with fewer elements is not worth quantizing: fp32, as in bitsandbytes
_TINY = 1e-38  # stands for the largest element of a block of zeros
_BINS = 65536
_AT_ONCE = 1 << 18  # elements that are looked up at once on a CPU


class Quantized(NamedTuple):
    """A tensor in 8 bits."""

    codes: Tensor  # the tensor's shape, uint8
    absmax: Tensor  # (ceil(n / 256),) fp32


@cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """The 256 levels, (256,) fp32, ascending, the last one 1."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += means + ([-level for level in means] if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


class Bins(NamedTuple):
    """A sorted table of middles as a look-up over the upper 16 bits of an fp32 number, 65,536 bins."""

    below: Tensor  # (65536,) uint8, how many middles lie below every number of the bin
    middle: Tensor  # (65536,) fp32, the middle that lies in the bin or above it; a number past it counts one more


def bins_of(levels: Tensor) -> Bins:
    """The look-up of the middles of ascending levels.

    Raises:
        ValueError: two middles share a bin, so that one comparison could not tell their levels apart.
    """
    middles = (levels[:-1] + levels[1:]) / 2
    upper = torch.arange(_BINS, dtype=torch.int32, device=levels.device)
    # of a negative number the bits that follow make it smaller
    least = torch.where(upper < _BINS // 2, upper << 16, upper << 16 | 0xFFFF).view(torch.float32)
    most = torch.where(upper < _BINS // 2, upper << 16 | 0xFFFF, upper << 16).view(torch.float32)
    below, through = (torch.bucketize(end, middles) for end in (least, most))
    number = torch.isfinite(least) & torch.isfinite(most)
    if bool((through - below)[number].gt(1).any()):
        raise ValueError("levels so close to each other need more bins")
    below = torch.where(number, below, len(middles))  # not a number: as `bucketize` has it
    return Bins(below.to(torch.uint8), torch.cat([middles, middles.new_full((1,), torch.inf)])[below])


def nearest(values: Tensor, bins: Bins) -> Tensor:
    """Codes (uint8, the values' shape) of the nearest levels to finite fp32 values (or NaN): what `bucketize` over the middles gives.

    Two look-ups and a comparison an element, in pieces that stay in a CPU's cache; a binary search takes ten times as long.
    """
    flat = values.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    piece = _AT_ONCE if flat.device.type == "cpu" else max(1, len(flat))
    for begin in range(0, len(flat), piece):
        part, out = flat[begin : begin + piece], codes[begin : begin + piece]
        bin_ = (part.view(torch.int32) >> 16).bitwise_and_(_BINS - 1)
        torch.index_select(bins.below, 0, bin_, out=out)
        out.add_(part > bins.middle.index_select(0, bin_))
    return codes.view(values.shape)


@cache
def _bins(device: torch.device, signed: bool) -> Bins:
    return bins_of(dynamic_map(device, signed))


def _blocks(flat: Tensor) -> Tensor:
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


@torch.no_grad()
def quantize(tensor: Tensor, signed: bool = True, positive: bool = False) -> Quantized:
    """The 8-bit form of a tensor of any shape and floating-point dtype.

    Args:
        tensor: what to hold; taken in fp32.
        signed: False for tensors without negative elements, such as second moments: twice the levels.
        positive: with signed=False, elements above zero never become zero. A second moment of zero beside a first moment that is not
            would make a step of m / eps; bitsandbytes takes that risk, for elements below 4e-4 of the block's largest gradient.
    """
    blocks = _blocks(tensor.reshape(-1).float())
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp_min(_TINY))[:, None]).clamp_(-1, 1)
    codes = nearest(scaled, _bins(tensor.device, signed))
    if positive and not signed:
        codes = torch.maximum(codes, (blocks > 0).view(torch.uint8))
    return Quantized(codes.view(-1)[: tensor.numel()].view(tensor.shape), absmax)


@torch.no_grad()
def dequantize(held: Quantized, signed: bool = True) -> Tensor:
    """The fp32 tensor that codes stand for, in their shape."""
    levels = dynamic_map(held.codes.device, signed)
    values = _blocks(levels.index_select(0, held.codes.reshape(-1).int())).mul_(held.absmax[:, None])
    return values.view(-1)[: held.codes.numel()].view(held.codes.shape)


def bytes_of(numel: int, element: int = 4) -> int:
    """Bytes of a moment of so many elements: in 8 bits, or whole (`element` bytes each) where it is small."""
    return element * numel if numel < SMALL else numel + 4 * -(-numel // BLOCK)
