"""CorDA: singular components of the weight times the covariance of its inputs, so that what counts is what the data excites.

    W C = U S V^T, C = mean of x x^T:      up = U_J diag(S_J / s)^(1/2),    down = diag(S_J / s)^(1/2) (V^T C^-1)_J

'ipm' (instruction-previewed) trains the largest r components, 'kpm' (knowledge-preserved) the smallest. Because diag(S) V^T C^-1 = U^T W,
down = diag(s S_J)^(-1/2) U_J^T W and s up down = U_J U_J^T W: neither an inverse nor V is needed, and a covariance of any rank will do.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits.base import Beginning, Calibration, Init, Statistics
from rankwise.inits.spectral import _check_rank, fix_signs, largest_directions, smallest_directions
from rankwise.updates import Site


@dataclass(frozen=True)
class Corda(Init):
    """Context-oriented singular components.

    mode: 'ipm' takes the largest, 'kpm' the smallest.
    balance: how the lengths are split: 'norm' gives both factors the same norm, whatever the size of the inputs; 'official' splits S in
        halves, so that larger inputs make `up` larger and `down` smaller.
    damping: adds damping * (mean of C's diagonal) to the diagonal; the official code begins with 0.01.
    normalize: 'sample' divides the inputs of each row by the size of their largest value and C by the number of rows, as the official
        code does; 'none' is the paper's C, a mean over tokens.
    svd: of 'ipm': 'exact', 'randomized', or 'auto': exact up to a smaller side of 512, randomized above. 'kpm' is always exact, in fp64.
    calibration_rows: rows of the training data to take the covariance from.
    """

    name: ClassVar[str] = "corda"
    moves_base: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True
    mode: Literal["ipm", "kpm"] = "ipm"
    balance: Literal["norm", "official"] = "norm"
    damping: float = 0.0
    normalize: Literal["none", "sample"] = "none"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise RecipeError(f"damping={self.damping!r} must be at least 0")

    @property
    def calibration(self) -> Calibration:
        return Calibration("covariance", self.calibration_rows, by_sample=self.normalize == "sample", direct=self.mode == "ipm")

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert weight is not None
        assert statistics is not None
        _check_rank(site)
        self._check_tokens(site, statistics.tokens)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        u, s, largest = self.directions(weight, self.product(weight, statistics), site.rank, generator)
        if not largest > 0:
            raise CalibrationError(
                f"the weight of {site.name} gives zero for all calibration inputs, so it has no directions; exclude this site"
            )
        # a component that the data does not excite: 0/0 in the formulas
        dead = s <= torch.finfo(s.dtype).eps * largest
        s = s.clamp_min(torch.finfo(s.dtype).eps * float(largest))
        root = (s / site.scaling).sqrt()  # (r,)
        up, down = u * root, (u.T @ weight) / (site.scaling * root)[:, None]
        if self.balance == "norm":
            ratio = (down.norm() / up.norm()).sqrt().clamp_min(torch.finfo(s.dtype).eps)
            up, down = up * ratio, down / ratio
        notes = (f"{int(dead.sum())} components are not excited by the calibration data",) if dead.any() else ()
        return Beginning(down, up, notes)

    def _check_tokens(self, site: Site, tokens: int) -> None:
        if tokens < site.rank:
            raise CalibrationError(
                f"{site.name} saw {tokens} calibration tokens, fewer than rank={site.rank}: they do not excite so many directions; give "
                "more rows (method.calibration_rows), or lower the rank"
            )
        if self.mode == "kpm" and tokens < site.in_features and not self.damping:
            raise CalibrationError(
                f"{site.name} saw {tokens} calibration tokens, fewer than its {site.in_features} inputs: mode='kpm' would train directions "
                "that the data never showed; give more rows (method.calibration_rows), or set damping=0.01"
            )

    def product(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """M = W (C + damping * mean(diag C) I), (out, in); in fp64 where small singular values count."""
        weight = weight.double() if self.mode == "kpm" else weight
        if statistics.product is not None:
            m = statistics.product.to(weight)
        else:
            assert statistics.covariance is not None
            m = weight @ statistics.covariance.to(weight)
        return m + self.damping * statistics.energy / weight.shape[1] * weight if self.damping else m

    def directions(self, weight: Tensor, m: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """U_J (out, r), S_J (r,) and the largest singular value of M, in the weight's dtype."""
        if self.mode == "kpm":
            u = smallest_directions(m, rank)  # fp64: a full decomposition
            largest = torch.linalg.matrix_norm(m, 2)
        else:
            u = largest_directions(m, rank, self.svd, generator)
            largest = (u.T @ m).norm(dim=1).max()
        s = (u.T @ m).norm(dim=1)
        return fix_signs(u).to(weight), s.to(weight), largest.to(weight)
