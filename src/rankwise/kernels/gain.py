"""Rows times a gain of their output: one pass over the tokens each way, with no fp32 copy of them where it can be done without.

A gain near 1 (DoRA's is) acts on 16-bit numbers as  y + y * (gain - 1),  computed in fp32 inside one operation and rounded once; only
gain - 1 is rounded to 16 bits before, which at |gain - 1| <= 1/8 is an eighth of the rounding of the result. Everything else goes
through fp32 in pieces that a cache holds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_NEAR = 0.125


def times_gain(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """gain * (y - bias) + bias, a new tensor, for y (tokens, out) and gain (out,) fp32; bit-exact at gain 1."""
    excess = gain - 1
    # a GPU multiplies mixed dtypes in one pass, and to ask it for a maximum would be to wait for it
    narrow = y.device.type == "cpu" and bias is None and y.dtype in (torch.bfloat16, torch.float16)
    if narrow and float(excess.abs().max()) <= _NEAR:
        return torch.addcmul(y, y, excess.to(y.dtype))
    made = torch.empty_like(y)
    for out, rows in zip(in_pieces(made), in_pieces(y), strict=True):
        out.copy_(reference_times_gain(rows, gain, bias))
    return made


def reference_times_gain(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain autograd, in the gain's dtype, rounded once to y's."""
    made = y * gain
    return (made if bias is None else made + (1 - gain) * bias).to(y.dtype)


def gain_gradient(y: Tensor, g: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum over tokens of g * (y - bias), (out,), in the gain's dtype."""
    total = torch.zeros_like(gain)
    for rows, slope in zip(in_pieces(y), in_pieces(g), strict=True):
        wide = rows.to(gain.dtype)
        total += ((wide if bias is None else wide - bias.to(gain.dtype)) * slope).sum(0)
    return total


def in_pieces(y: Tensor) -> Iterator[Tensor]:
    """Rows whose fp32 temporaries are alive at once: on a CPU what its caches hold."""
    rows = max(65536 // y.shape[-1], 1) if y.device.type == "cpu" else 1024
    return iter(y.split(rows))
