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


@cache
def _middles(device: torch.device, signed: bool) -> Tensor:
    levels = dynamic_map(device, signed)
    return (levels[:-1] + levels[1:]) / 2


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
    codes = torch.bucketize(scaled, _middles(tensor.device, signed), out_int32=True)
    if positive and not signed:
        codes = torch.where(blocks > 0, codes.clamp_min(1), codes)
    return Quantized(codes.to(torch.uint8).view(-1)[: tensor.numel()].view(tensor.shape), absmax)


@torch.no_grad()
def dequantize(held: Quantized, signed: bool = True) -> Tensor:
    """The fp32 tensor that codes stand for, in their shape."""
    levels = dynamic_map(held.codes.device, signed)
    values = _blocks(levels[held.codes.reshape(-1).int()]) * held.absmax[:, None]
    return values.view(-1)[: held.codes.numel()].view(held.codes.shape)


def bytes_of(numel: int, element: int = 4) -> int:
    """Bytes of a moment of so many elements: in 8 bits, or whole (`element` bytes each) where it is small."""
    return element * numel if numel < SMALL else numel + 4 * -(-numel // BLOCK)
