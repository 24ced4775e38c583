"""Dropout without a stored mask: the elements that fall out are drawn again in the backward, from a seed.

At the usual small probabilities only they are drawn: between two of them lie geometrically many that stay, so p * n exponential numbers
do the work of n random bits. On a GPU, or when much falls out, 16 random bits an element are compared (p rounded to a multiple of 2^-16).
"""

import math

import numpy as np
import torch
from torch import Tensor

_SPARSE_BELOW = 0.25  # above it, drawing gaps costs more than drawing bits


class Dropped:
    """Which elements of a tensor of `numel` elements fall out; the same arguments always name the same ones.

    Args:
        p: probability of each, independently; those that stay are scaled by 1 / (1 - p).
    """

    def __init__(self, numel: int, p: float, seed: int, device: torch.device) -> None:
        self.fallen = self.keep = None
        if device.type == "cpu" and p < _SPARSE_BELOW:
            self.scale = 1 / (1 - p)
            self.fallen = fallen_positions(numel, p, seed)
            return
        limit = min(round(p * 65536), 65535)
        generator = torch.Generator(device).manual_seed(seed)
        bits = torch.randint(-(2**63), 2**63 - 1, ((numel + 3) // 4,), generator=generator, device=device, dtype=torch.int64)
        self.keep = bits.view(torch.int16)[:numel] >= limit - 32768
        self.scale = 65536 / (65536 - limit)

    def of(self, x: Tensor) -> Tensor:
        """x with the fallen elements at zero and the others scaled, as a new tensor."""
        if self.fallen is None:
            assert self.keep is not None
            return x * self.keep.view(x.shape) * self.scale
        y = (x * self.scale).contiguous()
        y.view(-1).index_fill_(0, self.fallen, 0)
        return y


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each element kept with probability 1 - p and scaled by its inverse; the same seed gives the same mask."""
    return Dropped(x.numel(), p, seed, x.device).of(x)


def draw_seed() -> int:
    """A seed from the default CPU generator, which checkpointing restores: the recomputed forward draws the same mask."""
    return int(torch.randint(2**62, ()))


def fallen_positions(numel: int, p: float, seed: int) -> Tensor:
    """Ascending positions, int64, of the elements below `numel` that fall out, each independently with probability p < 1."""
    if p <= 0:
        return torch.empty(0, dtype=torch.int64)
    random = np.random.Generator(np.random.SFC64(seed))
    expected = numel * p
    found, last = [], -1
    while last < numel:  # once, but for one draw in a billion
        gaps = random.standard_exponential(int(expected + 6 * math.sqrt(expected)) + 16, dtype=np.float32)
        gaps *= np.float32(-1 / math.log1p(-p))  # its floor is geometric: how many stay before the next one falls
        positions = gaps.astype(np.int64)
        positions += 1
        np.cumsum(positions, out=positions)
        positions += last
        last = int(positions[-1])
        found.append(positions)
    every = found[0] if len(found) == 1 else np.concatenate(found)
    return torch.from_numpy(every[: np.searchsorted(every, numel)])
