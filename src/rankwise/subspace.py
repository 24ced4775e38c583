"""The subspace that a gradient lives in, and the coordinates of matrices in it: the mathematics that every form of GaLore shares.

    left:  R = P^T G  (rank, in),   back: P R        with P (out, rank)
    right: R = G P    (out, rank),  back: R P^T      with P (in, rank)

Zhao et al. 2024, "GaLore", arXiv 2403.03507, section 3 and algorithm 2. The *frame* P has orthonormal columns that span the `rank` leading
singular directions of a gradient G (out, in), in fp32 (fp64 for an fp64 gradient). Pure functions on tensors: no module, no state, and no
random number that does not come from the generator passed in.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rankwise.eightbit import bytes_of
from rankwise.errors import RecipeError

Side = Literal["left", "right"]
Projection = Literal["std", "reverse_std", "left", "right"]
Method = Literal["svd", "randomized", "random"]


ALL_ZERO = "the gradient is all zero"
NOT_FINITE = "the gradient is not finite"


class Refreshed(NamedTuple):
    """A frame, and why it was not taken from the gradient: `ALL_ZERO`, `NOT_FINITE`, or empty when it was."""

    frame: Tensor  # (k, rank), orthonormal columns
    note: str = ""


def side_of(out_features: int, in_features: int, projection: str = "std") -> Side:
    """Which side of a gradient (out, in) is projected. Decided once and stored: it cannot be told from shapes later.

    'std' projects the smaller side, so that the state is smallest: left when out < in, right otherwise. 'reverse_std' is its opposite.

    Raises:
        RecipeError: an unknown projection.
    """
    if projection not in get_args(Projection):
        raise RecipeError(f"projection={projection!r} is unknown; use one of {', '.join(get_args(Projection))}")
    if projection in ("left", "right"):
        return "left" if projection == "left" else "right"
    return "left" if (out_features < in_features) == (projection == "std") else "right"


def clamped(rank: int, out_features: int, in_features: int) -> int:
    """The rank that a weight of this shape can have at most.

    Raises:
        RecipeError: a rank below 1.
    """
    if rank < 1:
        raise RecipeError(f"rank={rank} is too small; a subspace has at least rank 1")
    return min(rank, out_features, in_features)


@torch.no_grad()
def refresh(
    gradient: Tensor,
    rank: int,
    side: Side,
    previous: Tensor | None = None,
    method: str = "randomized",
    generator: torch.Generator | None = None,
    oversample: int = 16,
    iterations: int = 2,
    align: bool = True,
) -> Refreshed:
    """The frame (k, rank) of a gradient (out, in); k = out for the left side, in for the right one. The rank is clamped to min(out, in).

    Args:
        gradient: any floating-point dtype; a half-precision one is decomposed in fp32.
        rank: columns of the frame.
        side: 'left' or 'right', from `side_of`.
        previous: the frame that was in use. One of another shape or device counts as none.
        method: 'svd' is exact. 'randomized' is a range finder the first time, and one subspace iteration that starts at `previous` later:
            products and an orthonormalisation only. 'random' is an orthonormal Gaussian, whatever the gradient.
        generator: where 'random' and the range finder draw from.
        oversample: extra columns of the range finder, and random directions beside a warm start.
        iterations: power iterations of the range finder, at least 1.
        align: flips columns so that diag(previous^T frame) >= 0, because singular vectors have no sign of their own and moments outlive
            the frame they were made in. The official code does not.

    Returns:
        The frame, and a note that is not empty when the gradient was not finite or all zero. Then the frame is `previous` itself, or
        without one the first columns of the identity: try again at the next step.

    Raises:
        RecipeError: an unknown method, a rank below 1, or a gradient that is no matrix.
    """
    if method not in get_args(Method):
        raise RecipeError(f"method={method!r} is unknown; use one of {', '.join(get_args(Method))}")
    if gradient.dim() != 2:
        raise RecipeError(f"a gradient of shape {tuple(gradient.shape)} has no subspace; only matrices have: flatten it to (out, the rest)")
    rank = clamped(rank, *gradient.shape)
    tall = gradient if side == "left" else gradient.T  # (k, the other side)
    tall = tall.to(torch.promote_types(tall.dtype, torch.float32))
    if previous is not None and (previous.shape != (len(tall), rank) or previous.device != tall.device):
        previous = None
    largest = tall.abs().amax()  # NaN if there is any
    if not torch.isfinite(largest) or largest == 0:
        kept = torch.eye(len(tall), rank, dtype=tall.dtype, device=tall.device) if previous is None else previous
        return Refreshed(kept, ALL_ZERO if largest == 0 else NOT_FINITE)
    if method == "svd":
        frame = torch.linalg.svd(tall, full_matrices=False).U[:, :rank] if side == "left" else _right_vectors(gradient, rank)
    elif method == "random":
        frame = random_frame(len(tall), rank, generator, like=tall)
    else:
        scaled = tall / largest  # squares of a tiny gradient would be zero in fp32
        frame = (
            _range(scaled, rank, generator, oversample, iterations) if previous is None else warm(scaled, previous, generator, oversample)
        )
    if previous is not None and align:
        frame = aligned(frame, previous)
    return Refreshed(frame.contiguous())


def _right_vectors(gradient: Tensor, rank: int) -> Tensor:
    """The right singular vectors (in, rank); of the matrix itself and not of its transpose, so that the last bit is the official code's."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return torch.linalg.svd(wide, full_matrices=False).Vh[:rank].T


def _range(matrix: Tensor, rank: int, generator: torch.Generator | None, oversample: int, iterations: int) -> Tensor:
    """The leading left singular vectors (k, rank) of (k, n), by a randomized range finder: Halko et al. 2011, algorithms 4.4 and 5.1."""
    width = min(rank + max(0, oversample), *matrix.shape)
    sketch = matrix @ gaussian((matrix.shape[1], width), generator, like=matrix)
    return _iterated(matrix, sketch, rank, max(1, iterations))


def warm(matrix: Tensor, previous: Tensor, generator: torch.Generator | None = None, oversample: int = 0) -> Tensor:
    """One subspace iteration from a frame (k, rank) on a matrix (k, n): nearly its leading left singular vectors if it moved little.

    `oversample` random directions of the matrix stand beside the frame, for what the frame has no part in; how much a bare iteration
    loses is measured by benchmarks/galore_refresh.py. (4 rank + 6 oversample) k n operations.
    """
    rank = previous.shape[1]
    width = min(rank + max(0, oversample), *matrix.shape) - rank
    start = previous.to(matrix)
    if width > 0:
        fresh = matrix @ gaussian((matrix.shape[1], width), generator, like=matrix)
        start = torch.cat([start, fresh / torch.linalg.vector_norm(fresh, dim=0).clamp_min(torch.finfo(fresh.dtype).tiny)], dim=1)
    return _iterated(matrix, start, rank, 1)


def _iterated(matrix: Tensor, start: Tensor, rank: int, iterations: int) -> Tensor:
    """The best `rank` directions (k, rank) that power iterations find from (k, width). Each half step is orthonormalised: singular values
    would otherwise act squared, and fp32 would lose those below 1e-3 of the largest."""
    basis = product = orthonormal(start)
    for _ in range(iterations):
        product = matrix @ orthonormal(matrix.T @ basis)
        basis = orthonormal(product)
    # left singular vectors of what the right subspace sees of the matrix, in order
    return basis @ torch.linalg.svd(basis.T @ product).U[:, :rank]


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis (k, r) of the columns of (k, r), k >= r, whose product with the matrix has a positive diagonal.

    Twice by Cholesky, all products, where the first pass left columns that are nearly orthonormal; else by Householder reflections, which
    also serve columns that are dependent.
    """
    lengths = torch.linalg.vector_norm(matrix, dim=0)  # (r,)
    once = _by_cholesky(matrix / lengths) if lengths.amin() > 0 else None
    if once is not None:
        gram = once.T @ once
        off = gram.clone()
        off.diagonal().sub_(1)
        # after a first pass this good the second one is exact up to rounding (Yamamoto et al. 2015, Cholesky-QR2)
        if off.abs().amax() * math.sqrt(len(gram)) < 0.1 and (twice := _by_cholesky(once, gram)) is not None:
            return twice
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _by_cholesky(matrix: Tensor, gram: Tensor | None = None) -> Tensor | None:
    """Q of a QR decomposition from the Gram matrix, or None where that has no Cholesky factor."""
    factor, info = torch.linalg.cholesky_ex(matrix.T @ matrix if gram is None else gram)
    if info.item():
        return None
    return torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)


def aligned(frame: Tensor, previous: Tensor) -> Tensor:
    """The frame with columns flipped so that none points away from its predecessor: diag(previous^T frame) >= 0."""
    return frame * torch.where((previous.to(frame) * frame).sum(0) < 0, -1.0, 1.0)


def random_frame(k: int, rank: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """An orthonormal frame (k, rank) of a uniformly drawn subspace, in the dtype and on the device of `like`."""
    return orthonormal(gaussian((k, rank), generator, like))


def gaussian(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard normal numbers from the generator, wherever that lives, in the dtype and on the device of `like`."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=device).to(like)


def project(gradient: Tensor, frame: Tensor, side: Side) -> Tensor:
    """Coordinates of a gradient (out, in) in the frame: (rank, in) left, (out, rank) right; in the frame's dtype, so in fp32 or more."""
    wide = gradient.to(frame.dtype)
    return frame.T @ wide if side == "left" else wide @ frame


def back(low: Tensor, frame: Tensor, side: Side) -> Tensor:
    """The matrix (out, in) that coordinates stand for."""
    return frame @ low if side == "left" else low @ frame.T


def rotate(first_moment: Tensor, second_moment: Tensor, previous: Tensor, new: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Adam's moments, carried from one frame to another: with C = new^T previous, M becomes C M and V becomes (C * C) V, which stays >= 0.

    (C * C) V is the variance of C R for coordinates R that are independent of each other. Not in the paper: there moments stay as they are.
    """
    turn = new.T @ previous.to(new)  # (rank, rank)
    if side == "left":
        return turn @ first_moment, turn.square() @ second_moment
    return first_moment @ turn.T, second_moment @ turn.square().T


def residual(gradient: Tensor, frame: Tensor, side: Side) -> float:
    """||G - P P^T G|| / ||G||: the part of a gradient that the frame misses."""
    wide = gradient.to(frame.dtype)
    return float(torch.linalg.matrix_norm(wide - back(project(wide, frame, side), frame, side)) / torch.linalg.matrix_norm(wide))


def overlap(previous: Tensor, new: Tensor) -> float:
    """||previous^T new||^2 / rank, 1 for the same subspace and about rank / k for unrelated ones, whatever the columns' signs and order."""
    return float((previous.to(new).T @ new).square().sum() / new.shape[1])


def state_bytes(out_features: int, in_features: int, rank: int, side: Side | None = None, states: str = "fp32", element: int = 4) -> int:
    """Bytes that the optimizer keeps for one weight: the frame (k rank) and two moments of the coordinates (rank K each).

    Args:
        out_features, in_features: shape of the weight; k is the projected side and K the other.
        rank: clamped to the smaller side.
        side: None takes the smaller one, as 'std' does.
        states: 'fp32', or '8bit': one byte an element and one fp32 scale for every 256, but fp32 below 4096 elements.
        element: bytes of an element of the frame and of a moment that is not in 8 bits; 8 for fp64 weights.
    """
    side = side_of(out_features, in_features) if side is None else side
    k, other = (out_features, in_features) if side == "left" else (in_features, out_features)
    rank = clamped(rank, out_features, in_features)
    moment = rank * other
    each = bytes_of(moment, element) if states == "8bit" else element * moment
    return element * k * rank + 2 * each
