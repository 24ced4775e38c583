"""A change of a weight as a pair of low rank, cut to a rank or to an energy.

    delta = U diag(s) V^T,   up = U_k diag(s_k)^(1/2),   down = diag(s_k)^(1/2) V_k^T,   kept = sum_{i<=k} s_i^2 / sum_i s_i^2

The best pair of its rank in the Frobenius norm (Eckart and Young). Shapes: delta (out, in), up (out, k), down (k, in).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.errors import CheckpointError
from rankwise.inits.spectral import largest_directions

EXACT_SIDE = 1024  # above this the decomposition is a randomized one


class Cut(NamedTuple):
    """A pair and how much of the change it keeps."""

    down: Tensor  # (k, in)
    up: Tensor  # (out, k), the scale multiplied in
    kept: float  # part of the squared Frobenius norm, 1 where nothing was cut

    @property
    def rank(self) -> int:
        """Ranks of the pair."""
        return len(self.down)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raises CheckpointError where neither makes sense."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise CheckpointError(f"rank={rank!r} must be a positive integer")
    if energy is not None and not 0 < energy <= 1:
        raise CheckpointError(f"energy={energy!r} must lie above 0 and at most at 1: the part of the squared norm to keep")


def _kept_ranks(values: Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """How many singular values (descending) to keep: at most `rank`, and no more than reach `energy`."""
    count = int((values > torch.finfo(values.dtype).eps * values[0]).sum()) if float(values[0]) > 0 else 0
    if energy is not None and count:
        # a rounding's worth of slack, so that energy 1 is all there is and not one rank more
        reached = values[:count].square().cumsum(0) >= (energy - 1e-12) * total
        count = min(count, int(reached.int().argmax()) + 1 if bool(reached.any()) else count)
    return count if rank is None else min(count, rank)


def _finish(u: Tensor, values: Tensor, v: Tensor, total: float, rank: int | None, energy: float | None) -> Cut:
    k = _kept_ranks(values, total, rank, energy)
    root = values[:k].sqrt()
    kept = 1.0 if total == 0 else min(1.0, float(values[:k].square().sum()) / total)
    return Cut(root[:, None] * v[:k], u[:, :k] * root, kept)


def cut_pair(down: Tensor, up: Tensor, rank: int | None = None, energy: float | None = None) -> Cut:
    """The best pair for up @ down, from two QRs and the SVD of the small core, in fp64; never a dense matrix."""
    left, inner_left = torch.linalg.qr(up.double())  # (out, m), (m, k)
    right, inner_right = torch.linalg.qr(down.double().T)  # (in, n), (n, k)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    # what came in was rounded to its dtype: below that stands no direction of the update
    values = torch.where(values > torch.finfo(up.dtype).eps * values[:1], values, 0)
    found = _finish(left @ u, values, v @ right.T, float(values.square().sum()), rank, energy)
    return Cut(found.down.to(down.dtype), found.up.to(up.dtype), found.kept)


def cut_dense(delta: Tensor, rank: int | None = None, energy: float | None = None, most: int = 512) -> Cut:
    """The best pair for a dense change; by a block Krylov space where both sides are larger than 1024.

    Args:
        delta: (out, in).
        rank: at most so many.
        energy: no more ranks than reach this part of the squared norm.
        most: never more than so many.
    """
    wide = delta if delta.dtype == torch.float64 else delta.float()
    total = float(wide.double().square().sum())
    rank = min(most, rank or most)
    if min(wide.shape) <= EXACT_SIDE:
        u, values, v = torch.linalg.svd(wide, full_matrices=False)
        return _finish(u, values, v, total, rank, energy)
    width = rank if energy is None else min(64, rank)
    while True:
        u = largest_directions(wide, width, "randomized", torch.Generator().manual_seed(0))  # (out, width)
        inner, values, v = torch.linalg.svd(u.T @ wide, full_matrices=False)
        if width >= rank or float(values.double().square().sum()) >= (energy or 1.0) * total:
            return _finish(u @ inner, values, v, total, rank, energy)
        width = min(2 * width, rank)
