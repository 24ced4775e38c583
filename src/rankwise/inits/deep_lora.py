"""Deep LoRA's frames: the subspaces in which gradient descent from a small orthogonal start will move, from one gradient.

    G = U S V^T, the gradient of the loss by the weight, (out, in); h = rank / 2; Q (out, in) the orthogonal product of the start's factors
    down = right^T,  up = left,     right spans [V_h, Q^T U_h] (in, rank),     left = Q right spans [Q V_h, U_h] (out, rank)

The official code finds `right` as the complement of the intersection of two null spaces of wide factors (out x out), by several full
decompositions. It is the span above, and a uniformly random Q enters only through its images of h vectors each: two random orthonormal
frames. Completing V_h and U_h by them gives the same law without any wide factor. The dynamics do not see in which basis of the two spans
the pair stands, as long as it is one pair: left = Q right, column by column.

Yaras et al. 2024, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", arXiv 2406.04112, section 4.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import CalibrationError
from rankwise.inits.base import Beginning, Calibration, Init, Statistics
from rankwise.inits.lora_ga import singular
from rankwise.updates import Site


@dataclass(frozen=True)
class DeepFrames(Init):
    """Orthonormal frames around the leading singular vectors of the gradient.

    frames: where Q sends what is not a singular vector: 'random', Q uniform over the orthogonal matrices, as in the official code;
        'identity', Q = 1 (padded where the sides differ), which draws nothing.
    repo_exact: where the sides differ Q is no more than a partial isometry, and the official code's frame on the smaller side is not
        orthonormal (lengths of at most 1). True keeps it so; False makes both frames orthonormal.
    estimate: 'full' sums the whole gradient; 'sketch' only ever holds thin products of it, in two sweeps over the data.
    svd: 'exact', 'randomized', or 'auto': exact up to a smaller side of 512, randomized above. The sketch is always decomposed exactly.
    calibration_rows: rows of the training data to take the gradient from; the official code takes one batch.
    """

    name: ClassVar[str] = "deep-lora"
    gives_frames: ClassVar[bool] = True
    frames: Literal["random", "identity"] = "random"
    repo_exact: bool = False
    estimate: Literal["full", "sketch"] = "full"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    calibration_rows: int = 64

    @property
    def calibration(self) -> Calibration:
        return Calibration("gradient" if self.estimate == "full" else "gradient-sketch", self.calibration_rows)

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert statistics is not None
        wanted = (site.rank + 1) // 2
        if statistics.tokens < wanted:
            raise CalibrationError(
                f"{site.name} saw {statistics.tokens} calibration tokens, and {wanted} directions of its gradient are needed; give more "
                "rows (method.calibration_rows), or lower the rank"
            )
        u, s, v = singular(statistics, wanted, self.svd, generator)
        if not s[0] > 0:
            raise CalibrationError(
                f"the gradient at {site.name} is zero: the loss does not depend on it; exclude this site, or give labels it acts on"
            )
        precision = torch.finfo(s.dtype).eps
        live = int((s > precision * max(site.in_features, site.out_features) * s[0]).sum())
        notes = ()
        if live < wanted:
            notes = (f"the calibration gradient has rank {live}, so {wanted - live} of {wanted} directions on each side are random",)
        # on the CPU in fp64, the site's own generator being there: thin matrices only
        u, v = u[:, : min(live, site.rank // 2)].cpu().double(), v[:, :live].cpu().double()
        taller = site.out_features >= site.in_features
        build = _identity if self.frames == "identity" else _random
        small, large = build(*((v, u) if taller else (u, v)), site.rank, self.repo_exact, 100 * precision, generator)
        right, left = (small, large) if taller else (large, small)
        return Beginning(right.T, left, notes)


def _random(inner: Tensor, outer: Tensor, rank: int, exact: bool, precision: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(small, large) for a uniformly random Q from the smaller side to the larger one: large = Q small, the spans holding the vectors.

    Q sends `inner` to a random frame, the first columns of `large`. What `outer` adds to that frame comes from the complement of `inner`:
    from a random frame there, shortened by Q^T where the sides differ (`exact`).
    """
    first = inner.shape[1] if inner.shape[1] + outer.shape[1] == rank else rank - outer.shape[1]
    small = _orthonormal(torch.cat([inner, _gaussian(len(inner), rank - inner.shape[1], generator)], 1), precision, generator)
    large = _orthonormal(torch.cat([_gaussian(len(outer), first, generator), outer], 1), precision, generator)
    if exact and len(small) < len(large):
        sent = inner.shape[1]
        block = torch.linalg.qr(_gaussian(len(large) - sent, rank - sent, generator)).Q[: len(small) - sent]
        small[:, sent:] = small[:, sent:] @ torch.linalg.qr(block).R
    return small, large


def _identity(inner: Tensor, outer: Tensor, rank: int, exact: bool, precision: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(small, large) for Q = 1 above a block of zeros: small = Q^T large, the first rows of `large`."""
    padded = torch.cat([inner, inner.new_zeros(len(outer) - len(inner), inner.shape[1])])
    fill = _gaussian(len(outer), rank - inner.shape[1] - outer.shape[1], generator)
    large = _orthonormal(torch.cat([outer, padded, fill], 1), precision, generator)
    small = large[: len(inner)]
    if not exact and len(small) < len(large):
        left, _, right = torch.linalg.svd(small, full_matrices=False)
        small = left @ right  # the nearest orthonormal columns, in the same span
    return small, large


def _gaussian(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def _orthonormal(columns: Tensor, precision: float, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (size, count) whose span holds the given ones; those that depend on earlier ones are replaced by random ones."""
    r = torch.linalg.qr(columns).R
    dependent = r.diagonal().abs() <= precision * columns.norm(dim=0)
    columns = torch.where(dependent, _gaussian(len(columns), columns.shape[1], generator), columns) if dependent.any() else columns
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal().sign()
