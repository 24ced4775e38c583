"""Dropout by the elements that fall out, drawn once for all sites that read one input.

At the usual small probabilities only they are drawn: between two of them lie geometrically many that stay, so p * n exponential numbers
do the work of n random bits, and their positions, 4 p bytes an element, are kept for the backward. On a GPU, or when much falls out, 16
random bits an element are compared (p rounded to a multiple of 2^-16) and drawn again in the backward.
"""

import math
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SPARSE_BELOW = 0.25  # above it, drawing gaps costs more than drawing bits
_ATTRIBUTE = "_rankwise_dropped"


class Dropped:
    """Which elements of a tensor of `numel` elements fall out; the same arguments always name the same ones.

    Args:
        p: probability of each, independently; those that stay are scaled by 1 / (1 - p).
        fallen: the positions, int32, where they are known already.
    """

    def __init__(self, numel: int, p: float, seed: int, device: torch.device, fallen: Tensor | None = None) -> None:
        self.numel, self.p, self.seed, self.device = numel, p, seed, device
        self.sparse = device.type == "cpu" and p < _SPARSE_BELOW
        self.limit = min(round(p * 65536), 65535)
        self.scale = 1 / (1 - p) if self.sparse else 65536 / (65536 - self.limit)
        self.fallen = fallen if fallen is not None or not self.sparse else fallen_positions(numel, p, seed).to(torch.int32)

    def of(self, x: Tensor) -> Tensor:
        """x with the fallen elements at zero and the others scaled, as a new tensor."""
        if self.fallen is not None:
            return self.clear((x * self.scale).contiguous())
        generator = torch.Generator(self.device).manual_seed(self.seed)
        words = (self.numel + 3) // 4
        bits = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator, device=self.device, dtype=torch.int64)
        keep = bits.view(torch.int16)[: self.numel] >= self.limit - 32768
        return x * keep.view(x.shape) * self.scale

    def clear(self, y: Tensor) -> Tensor:
        """Zeros at the fallen elements of a contiguous tensor of our own, in place."""
        assert self.fallen is not None
        y.view(-1).index_fill_(0, self.fallen.long(), 0)
        return y


class _Shared(NamedTuple):
    """The draw that stands on an input, and for whom it holds."""

    mask: Dropped
    p: float
    version: int
    region: "weakref.ref[Any] | None"
    takers: set[int]


def dropped(x: Tensor, p: float, taker: object) -> Dropped:
    """What falls out of x for one taker: sites that read the very same tensor share one draw, and each of them takes it once.

    Whoever asks again begins a new draw: it is another forward. So does a checkpointed region, which draws its seeds again when it is
    run again: a mask must not cross its border.
    """
    if x.is_inference():  # such tensors have no version
        return Dropped(x.numel(), p, draw_seed(), x.device)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    found: _Shared | None = getattr(x, _ATTRIBUTE, None)
    fits = (
        found is not None
        and (found.p, found.version) == (p, x._version)
        and id(taker) not in found.takers
        and (found.region is None if hooks is None else found.region is not None and found.region() is hooks[0])
    )
    if not fits or found is None:
        region = None if hooks is None else weakref.ref(hooks[0])
        found = _Shared(Dropped(x.numel(), p, draw_seed(), x.device), p, x._version, region, set())
        setattr(x, _ATTRIBUTE, found)
    found.takers.add(id(taker))
    return found.mask


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
