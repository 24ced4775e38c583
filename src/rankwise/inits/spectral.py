"""Starts from the singular vectors of the frozen weight: PiSSA takes the largest, MiLoRA the smallest.

    W = U diag(S) V^T,  with r selected columns u:      up = u diag(s / scaling)^(1/2),   down = diag(s / scaling)^(1/2) v^T

so that scaling * up @ down = u u^T W, and what is left of W is what the method freezes. In projection form only u is needed; the same
skeleton with another orthonormal u gives OLoRA.

PiSSA: Meng et al. 2024, arXiv 2404.02948, section 3. MiLoRA: Wang et al. 2024, arXiv 2406.09044, section 3.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import RecipeError
from rankwise.inits.base import Beginning, Init, Statistics
from rankwise.subspace import orthonormal
from rankwise.updates import Site

OVERSAMPLE, ITERATIONS = 8, 12
EXACT_UP_TO = 512  # below that a full decomposition takes no more than a tenth of a second
STANDS = 1e-3  # the share of the subspace that a further step changed


def projected(weight: Tensor, u: Tensor, s: Tensor, scaling: float, balance: str) -> Beginning:
    """The pair for an orthonormal u (out, r) whose rows of u^T W have lengths s (r,): scaling * up @ down = u u^T W.

    Directions of length zero would give a zero row and a zero column, which never receive a gradient; they become up = u, down = 0.
    """
    dead = s <= torch.finfo(weight.dtype).eps * torch.linalg.matrix_norm(weight)  # what rounding leaves of a zero
    coordinates = u.T @ weight  # (r, in)
    if balance == "sqrt":
        root = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt() / math.sqrt(scaling)
        up, down = u * root, coordinates / root[:, None] / scaling
    elif balance == "unit":
        up, down = u, coordinates / scaling
    else:
        raise RecipeError(f"balance={balance!r} is unknown; use 'sqrt' (both factors alike) or 'unit' (orthonormal up)")
    notes: tuple[str, ...] = ()
    if dead.any():
        up, down = torch.where(dead, u, up), torch.where(dead[:, None], torch.zeros_like(down), down)
        notes = (f"{int(dead.sum())} directions of length zero start at down = 0",)
    return Beginning(down, up, notes)


def fix_signs(u: Tensor) -> Tensor:
    """Flips columns so that each one's largest entry is positive: two machines agree on the factors, not only on their product."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))  # (1, r)
    return u * torch.where(largest < 0, -1.0, 1.0)


def largest_directions(
    weight: Tensor, rank: int, svd: str, generator: torch.Generator, oversample: int | None = None, iterations: int | None = None
) -> Tensor:
    """The left singular vectors (out, rank) of the largest singular values.

    Args:
        weight: (out, in), fp32 or fp64.
        rank: how many.
        svd: 'exact' is a full decomposition; 'randomized' a block Krylov space, O(out in rank) for each of its steps; 'auto' is exact up to
            a smaller side of 512. Where fewer than four blocks fit into the smaller side, all three are exact.
        generator: of the space's first block.
        oversample: columns of a block beyond the rank; None means 8.
        iterations: steps at most; it ends before when the subspace stands still. None means 12.
    """
    width = rank + (OVERSAMPLE if oversample is None else oversample)
    small = min(weight.shape)
    if svd == "exact" or 4 * width > small or (svd == "auto" and small <= EXACT_UP_TO):
        return torch.linalg.svd(weight, full_matrices=False).U[:, :rank]
    return _krylov(weight, rank, min(width, small), ITERATIONS if iterations is None else iterations, generator)


def _krylov(weight: Tensor, rank: int, width: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Rayleigh-Ritz on the span of Q, W W^T Q, (W W^T)^2 Q, ... for a random Q (out, width), with every block orthogonal to all before it.

    Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition", arXiv
    1504.05477, algorithm 2. A power iteration of as many products keeps the last block only: where the singular values fall slowly, as
    those of trained weights do, it finds a fraction of the subspace.
    """
    wide = torch.float64 if weight.device.type != "mps" else weight.dtype
    sketch = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float32).to(weight)
    basis = orthonormal(weight @ sketch)  # (out, k)
    seen = weight.T @ basis  # (in, k), W^T basis
    gram = seen.T.to(wide) @ seen.to(wide)  # (k, k)
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # coordinates of the leading directions in the basis, ascending
    for _ in range(iterations):
        if basis.shape[1] + width > min(weight.shape):
            break
        product = weight @ seen[:, -width:]
        block = product - basis @ (basis.T @ product)
        if block.norm() <= 8 * torch.finfo(block.dtype).eps * product.norm():
            break  # the weight has no further directions
        block = orthonormal(block)  # and once more: what is left of the old directions after one pass is rounding, after two nothing
        block = orthonormal(block - basis @ (basis.T @ block))
        new = weight.T @ block
        cross, corner = seen.T.to(wide) @ new.to(wide), new.T.to(wide) @ new.to(wide)
        gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, corner], 1)])
        basis, seen = torch.cat([basis, block], 1), torch.cat([seen, new], 1)
        before, leading = leading, torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        if float((before.T @ leading[: len(before)]).square().sum()) > (1 - STANDS) * rank:
            break
    if weight.dtype == wide:  # whose Gram matrix would lose its smaller directions
        return (basis @ torch.linalg.svd(seen.T, full_matrices=False).U)[:, :rank]
    return basis @ leading.flip(1).to(basis)


def smallest_directions(weight: Tensor, rank: int) -> Tensor:
    """The left singular vectors (out, rank) of the smallest singular values among min(out, in), ascending.

    From the fp64 eigenvectors of the smaller Gram matrix: cheaper than a full decomposition. Never in fp32, where squaring loses them; and
    not for an fp64 weight, for the same reason.
    """
    wide = weight.double()
    if weight.dtype != torch.float64:
        if weight.shape[0] <= weight.shape[1]:
            return torch.linalg.eigh(wide @ wide.T).eigenvectors[:, :rank].to(weight)
        values, v = torch.linalg.eigh(wide.T @ wide)  # (in,), (in, in)
        if values[0] > 1e-12 * values[-1]:
            # W v has orthogonal columns of length s; QR makes them orthonormal also where s is tiny
            return torch.linalg.qr(wide @ v[:, :rank]).Q.to(weight)
        # where s is zero W v is rounding noise, which may point along the large directions: decompose after all
    return torch.linalg.svd(wide, full_matrices=False).U[:, -rank:].flip(1).to(weight)


def _exact(site: Site, weight: Tensor) -> Tensor:
    _check_rank(site)
    return weight if weight.dtype == torch.float64 else weight.float()


def _check_rank(site: Site) -> None:
    sides = min(site.in_features, site.out_features)
    if site.rank > sides:
        raise RecipeError(f"rank={site.rank} at {site.name} is larger than its smaller side {sides}; lower the rank to at most {sides}")


@dataclass(frozen=True)
class Pissa(Init):
    """Principal singular components.

    svd: 'exact', 'randomized', or 'auto': exact up to a smaller side of 512, randomized above.
    oversample: extra columns of a block of the Krylov space; None means 8.
    iterations: its steps at most; None means 12. It ends before where a step changes less than 1e-3 of the subspace.
    """

    name: ClassVar[str] = "pissa"
    moves_base: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True
    svd: Literal["auto", "exact", "randomized"] = "auto"
    oversample: int | None = None
    iterations: int | None = None
    balance: Literal["sqrt", "unit"] = "sqrt"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert weight is not None
        weight = _exact(site, weight)
        u = fix_signs(largest_directions(weight, site.rank, self.svd, generator, self.oversample, self.iterations))
        return projected(weight, u, (u.T @ weight).norm(dim=1), site.scaling, self.balance)


@dataclass(frozen=True)
class MinorComponents(Init):
    """MiLoRA: minor singular components. `selector` also offers the middle ones and a random subset (the official code's options)."""

    name: ClassVar[str] = "milora-svd"
    moves_base: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True
    selector: Literal["min", "mid", "max", "random"] = "min"
    balance: Literal["sqrt", "unit"] = "sqrt"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert weight is not None
        weight = _exact(site, weight)
        u = fix_signs(self.directions(weight, site.rank, generator))
        return projected(weight, u, (u.T @ weight).norm(dim=1), site.scaling, self.balance)

    def directions(self, weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        """The selected left singular vectors (out, rank)."""
        if self.selector == "min":
            return smallest_directions(weight, rank)
        u = torch.linalg.svd(weight, full_matrices=False).U  # (out, k), descending
        if self.selector == "max":
            return u[:, :rank]
        if self.selector == "mid":
            first = (u.shape[1] - rank) // 2
            return u[:, first : first + rank]
        return u[:, torch.randperm(u.shape[1], generator=generator)[:rank].sort().values.to(u.device)]
