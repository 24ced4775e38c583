"""EVA: `down` starts at the principal directions of the site's inputs, `up` at zero, and ranks go where they explain most variance.

    C - m m^T = V diag(lambda) V^T  (mean m and second moment C of the inputs x):    down = V_r^T,  up = 0
    ratio_i = lambda_i / trace(C - m m^T);  the `budget` largest ratios over all sites and their first rho * rank directions get a rank each

The budget is the sum of the ranks that the recipe gives. Sites that read one input share one covariance. Afterwards this is a plain LoRA.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170, section 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits.base import Beginning, Calibration, Init, Statistics
from rankwise.inits.spectral import fix_signs, largest_directions
from rankwise.updates import Site


@dataclass(frozen=True)
class Eva(Init):
    """Principal directions of the inputs.

    rho: a site gets at most rho times its rank; 1 leaves the ranks as they are.
    adjust_scaling: alpha follows the rank, so that the scaling alpha / rank of a site stays what it was.
    whiten: divides each row of `down` by the standard deviation along it, so that the parts of down @ x vary alike.
    centre: directions of the variance; False takes those of the second moment, mean included.
    label_mask: only tokens with a label count.
    svd: 'exact', 'randomized', or 'auto': exact up to 512 inputs, randomized above.
    calibration_rows: rows of the training data to take the covariance from.
    """

    name: ClassVar[str] = "eva"
    zero_role: ClassVar[str] = "up"
    rho: float = 2.0
    adjust_scaling: bool = True
    whiten: bool = False
    centre: bool = True
    label_mask: bool = True
    svd: Literal["auto", "exact", "randomized"] = "auto"
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise RecipeError(f"rho={self.rho!r} of the eva init must be at least 1, which leaves the ranks as they are; 2 is usual")

    @property
    def calibration(self) -> Calibration:
        return Calibration("covariance", self.calibration_rows, direct=False, labelled=self.label_mask)

    @property
    def distributes(self) -> bool:
        return self.rho > 1

    def candidates(self, rank: int) -> int:
        return round(self.rho * rank)

    def settled(self) -> "Eva":
        return replace(self, rho=1.0)

    def distributed_alpha(self, site: Site, rank: int) -> float:
        return site.alpha * rank / site.rank if self.adjust_scaling else site.alpha

    def notes(self, sites: Sequence[Site]) -> list[str]:
        ranks = [site.rank for site in sites]
        total = sum(ranks)
        if not self.distributes:
            return [] if len(set(ranks)) < 2 else [f"the {total} ranks are distributed, {min(ranks)} to {max(ranks)} a site"]
        return [f"the {total} ranks of this table go to the directions that explain most of the inputs, at most {self.rho:g} times as many "
                "at a site as stand here; sites that get none are left out"]  # fmt: skip

    def distribute(self, sites: Sequence[Site], begun: Mapping[str, Beginning]) -> dict[str, int]:
        ratios = [(float(ratio), site.name) for site in sites for ratio in _weights(begun[site.name])]
        ratios.sort(key=lambda pair: -pair[0])  # stable: of equal ones the first site's come first
        ranks = {site.name: 0 for site in sites}
        for _, name in ratios[: sum(site.rank for site in sites)]:
            ranks[name] += 1
        return ranks

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert statistics is not None
        assert statistics.covariance is not None
        assert statistics.mean is not None
        if statistics.tokens < site.rank:
            raise CalibrationError(
                f"{site.name} saw {statistics.tokens} calibration tokens, and {site.rank} directions of its inputs are needed; give more "
                "rows (method.calibration_rows), or lower the rank or rho"
            )
        c = statistics.covariance.double()  # the mean's part may be far larger than what is left
        if self.centre:
            c = c - torch.outer(statistics.mean.double(), statistics.mean.double())
        total = c.trace()
        if not total > torch.finfo(statistics.covariance.dtype).eps * statistics.energy:
            raise CalibrationError(
                f"the inputs of {site.name} do not vary over the calibration tokens; exclude this site, or give other rows"
            )
        v = fix_signs(largest_directions(c, site.rank, self.svd, generator))  # (in, rank)
        variances, order = (v * (c @ v)).sum(0).clamp_min(0).sort(descending=True, stable=True)
        v = v[:, order]
        dead = variances <= torch.finfo(torch.float32).eps * total
        down = v.T / variances.sqrt().clamp_min(torch.finfo(torch.float32).tiny)[:, None] if self.whiten else v.T
        down = torch.where(dead[:, None], v.T, down).to(statistics.covariance)
        notes = (f"{int(dead.sum())} of {site.rank} directions are arbitrary: the inputs do not vary along them",) if dead.any() else ()
        return Beginning(down, torch.zeros(site.out_features, site.rank), notes, variances / total)


def _weights(begun: Beginning) -> list[float]:
    assert begun.weights is not None
    return begun.weights.tolist()
