"""ROSA's start: a random slice of the frozen weight's own decomposition, a new one for every round.

    W = U diag(S) V^T,  r drawn directions I:      up = U_I,   down = U_I^T W / scaling  ( = S_I V_I^T / scaling )

"ROSA: Random Subspace Adaptation for Efficient Fine-Tuning", arXiv 2407.07802, algorithm 1; official code rosa-paper/rosa. For any
orthonormal U_I  W = (W - U_I U_I^T W) + U_I U_I^T W,  so what the start takes out of W is exact however exact U_I is: only which directions
are drawn depends on the decomposition. `schedules/rosa.py` folds the trained pair into W and draws the next one.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import RecipeError
from rankwise.inits.base import Beginning, Init, Statistics, site_generator
from rankwise.inits.spectral import _exact, fix_signs, projected
from rankwise.updates import Site

_DRAWN = ("subset", "block")  # modes that draw positions among the singular directions


@dataclass(frozen=True)
class Slice(Init):
    """A slice of the weight.

    mode: which directions. 'subset': a uniform random subset of the singular directions; 'block': neighbours, from a random first one (the
        official code, which never draws the last direction: here all blocks are equally likely); 'top', 'bottom': the largest, the
        smallest; 'proj_left', 'proj_right': a random orthonormal frame on the output or input side, which needs no decomposition.
    factorization: how singular directions are found: 'svd'; 'gram', the fp64 eigenvectors of the smaller Gram matrix, which is
        cheaper, most where the sides differ; 'auto': svd up to a smaller side of 1024 and for fp64 weights, gram above. What gram cannot
        resolve is left to svd.
    balance: 'paper', the singular values stand in `down` (of 'proj_right', in `up`), or 'sqrt', their roots in both.
    covering: positions are drawn without replacement over the rounds, until each was taken; then anew.
    """

    name: ClassVar[str] = "rosa"
    moves_base: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True
    mode: Literal["subset", "block", "top", "bottom", "proj_left", "proj_right"] = "subset"
    factorization: Literal["auto", "svd", "gram"] = "auto"
    balance: Literal["paper", "sqrt"] = "paper"
    covering: bool = False

    def __post_init__(self) -> None:
        known = {
            "mode": (*_DRAWN, "top", "bottom", "proj_left", "proj_right"),
            "factorization": ("auto", "svd", "gram"),
            "balance": ("paper", "sqrt"),
        }
        for label, values in known.items():
            if getattr(self, label) not in values:
                raise RecipeError(f"{label}={getattr(self, label)!r} of the rosa init is unknown; use one of {', '.join(values)}")
        if self.covering and self.mode not in _DRAWN:
            raise RecipeError(f"covering=True with mode={self.mode!r}: no positions are drawn there; use mode='subset' or 'block'")

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert weight is not None
        return self._slice(site, weight, generator, 0)

    def again(self, site: Site, weight: Tensor, seed: int, number: int) -> Beginning:
        if not self.covering:
            return super().again(site, weight, seed, number)
        # the order of a whole cycle is drawn by its first round: what was covered is a function of the round, and no state
        cycle, place = divmod(number, -(-min(weight.shape) // site.rank))
        first = number - place
        return self._slice(site, weight, site_generator(seed, site.name, f"round {first}" if cycle else "init"), place)

    def _slice(self, site: Site, weight: Tensor, generator: torch.Generator, place: int) -> Beginning:
        wide = _exact(site, weight)  # (out, in), fp32 or fp64
        balance = "unit" if self.balance == "paper" else self.balance
        if self.mode == "proj_right":
            # the same identity of the transposed weight: what is projected stands on the right
            begun = _transposed(projected(wide.T, *_frame(wide.T, site.rank, generator), site.scaling, balance))
        elif self.mode == "proj_left":
            begun = projected(wide, *_frame(wide, site.rank, generator), site.scaling, balance)
        else:
            index = positions(self.mode, min(wide.shape), site.rank, generator, place, self.covering)
            u = fix_signs(left_vectors(wide, index.to(wide.device), self.factorization))
            begun = projected(wide, u, (u.T @ wide).norm(dim=1), site.scaling, balance)
        # in the weight's own precision, so that what is taken out of a 16-bit weight is what its forward adds
        down, up = (None if tensor is None else tensor.to(weight.dtype).to(wide.dtype) for tensor in (begun.down, begun.up))
        return Beginning(down, up, begun.notes)


def _frame(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random orthonormal frame (out, rank) and the lengths (rank,) of the rows of its coordinates; drawn and made on the CPU in fp64, so
    that every machine has the same."""
    frame = torch.linalg.qr(torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)).Q
    frame = fix_signs(frame).to(weight)
    return frame, (frame.T @ weight).norm(dim=1)


def _transposed(begun: Beginning) -> Beginning:
    assert begun.down is not None
    assert begun.up is not None
    return Beginning(begun.up.T, begun.down.T, tuple(note.replace("down = 0", "up = 0") for note in begun.notes))


def positions(mode: str, count: int, rank: int, generator: torch.Generator, place: int = 0, covering: bool = False) -> Tensor:
    """Which of `count` singular directions, (rank,), ascending.

    Args:
        mode: 'subset', 'block', 'top' or 'bottom'.
        count: min(out, in).
        rank: how many; at most `count`.
        generator: the only source of randomness.
        place: with `covering`, how many slices of the same order came before.
        covering: slices of one random order; the last of a cycle is filled up from its beginning.
    """
    if mode == "top":
        return torch.arange(rank)
    if mode == "bottom":
        return torch.arange(count - rank, count)
    if mode == "subset":
        return torch.randperm(count, generator=generator).roll(-place * rank)[:rank].sort().values
    if covering:
        order = torch.randperm(-(-count // rank), generator=generator)  # of the blocks; the last one ends at the last direction
        first = min(int(order[place]) * rank, count - rank)
    else:
        first = int(torch.randint(count - rank + 1, (), generator=generator))
    return torch.arange(first, first + rank)


def left_vectors(weight: Tensor, index: Tensor, factorization: str) -> Tensor:
    """The left singular vectors (out, rank) at some positions of the descending order, orthonormal.

    'gram' squares the singular values, so it works in fp64 and leaves an fp64 weight, and directions that are lost in rounding, to 'svd'.
    """
    if factorization == "auto":
        factorization = "svd" if min(weight.shape) <= 1024 else "gram"
    if factorization == "gram" and weight.dtype != torch.float64:
        wide = weight.double()
        if weight.shape[0] <= weight.shape[1]:
            return torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, index].to(weight)
        values, v = torch.linalg.eigh(wide.T @ wide)  # ascending
        values, v = values.flip(0)[index], v.flip(1)[:, index]
        largest = wide.square().sum()
        if values.min() > 1e-12 * largest:
            # W v has orthogonal columns of length s; QR makes them orthonormal also where s is small
            return torch.linalg.qr(wide @ v).Q.to(weight)
    return torch.linalg.svd(weight, full_matrices=False).U[:, index]
