"""LoRA-GA: the start whose first step moves the weight as a step of full fine-tuning would.

    G = U S V^T, the gradient of the loss by the weight, (out, in):     down = c V_I^T,   up = c U_J,   I and J disjoint in 1..2r

The first step of gradient descent moves W by -lr s^2 (up up^T G + G down^T down) = -lr s^2 c^2 G_2r, the best approximation of rank 2r.
No singular value enters: neither the size of the loss nor the signs of U and V matter. c = out^(1/4) / sqrt(gamma).

Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, section 3 and algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import CalibrationError
from rankwise.inits.base import Beginning, Calibration, Init, Statistics
from rankwise.inits.spectral import fix_signs, largest_directions
from rankwise.updates import Site


@dataclass(frozen=True)
class LoraGa(Init):
    """Singular vectors of the gradient.

    direction: which of the first 2r `down` and `up` take: 'down-first' (the paper's), 'up-first', 'interleaved', 'random'.
    scale: c; 'stable' is out^(1/4) / sqrt(gamma), 'gd' is 1 / scaling, 'unit' is 1.
    gamma: of the stable scale; the larger, the smaller the start.
    estimate: 'full' sums the whole gradient; 'sketch' only ever holds thin products of it, in two sweeps over the data.
    svd: 'exact', 'randomized', or 'auto': exact up to a smaller side of 512, randomized above. The sketch is always decomposed exactly.
    calibration_rows: rows of the training data to take the gradient from.
    """

    name: ClassVar[str] = "lora-ga"
    moves_base: ClassVar[bool] = True
    direction: Literal["down-first", "up-first", "interleaved", "random"] = "down-first"
    scale: Literal["stable", "gd", "unit"] = "stable"
    gamma: float = 16.0
    estimate: Literal["full", "sketch"] = "full"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    calibration_rows: int = 64

    @property
    def calibration(self) -> Calibration:
        return Calibration("gradient" if self.estimate == "full" else "gradient-sketch", self.calibration_rows)

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert statistics is not None
        assert statistics.gradient is not None
        wanted = min(2 * site.rank, site.in_features, site.out_features)
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
        notes = []
        if site.rank * 2 > wanted:
            notes.append(f"`down` and `up` share {2 * site.rank - wanted} directions: the gradient has no more than {wanted}")
        dead = int((s <= torch.finfo(s.dtype).eps * max(site.in_features, site.out_features) * s[0]).sum())
        if dead:
            notes.append(f"the calibration gradient has rank {wanted - dead}, so {dead} of {wanted} directions are arbitrary")
        mine, other = self.indices(site.rank, wanted, generator)
        c = self.size(site)
        return Beginning(c * v[:, mine].T, c * u[:, other], tuple(notes))

    def indices(self, rank: int, wanted: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """The singular vectors of `down` and of `up`, each `rank` many out of `wanted`; disjoint where wanted is 2 rank."""
        order = torch.randperm(wanted, generator=generator).tolist() if self.direction == "random" else list(range(wanted))
        if self.direction == "interleaved" and wanted == 2 * rank:
            order = [*order[0::2], *order[1::2]]
        first, last = order[:rank], order[wanted - rank :]
        return (last, first) if self.direction in ("up-first", "interleaved") else (first, last)

    def size(self, site: Site) -> float:
        """c, the length of each row of `down` and of each column of `up`."""
        if self.scale == "stable":
            return site.out_features**0.25 / self.gamma**0.5
        return 1 / site.scaling if self.scale == "gd" else 1.0


def singular(statistics: Statistics, count: int, svd: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, count), S (count,), V (in, count) of the gradient over its largest entry, signs of U and of V fixed each for itself."""
    gradient, basis = statistics.gradient, statistics.basis
    assert gradient is not None
    # the size of the loss must not reach the limits of the number format
    gradient = gradient / gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
    if basis is None:
        basis = largest_directions(gradient, count, svd, generator)
        gradient = basis.T @ gradient  # (count, in)
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    return fix_signs((basis @ u)[:, :count]), s[:count], fix_signs(vt[:count].T)
