"""LoRA-One: the start is one step of full fine-tuning, cut to the rank, and it stays in the model.

    G = U S V^T, the gradient of the loss by the weight, (out, in):     up = -U_r R,   down = R V_r^T

    size='relative'   R = diag(S_r / S_1 / gamma)^(1/2):        the update starts at -scaling / gamma * U_r diag(S_r / S_1) V_r^T
    size='gradient'   R = diag(S_r / gamma / scaling)^(1/2):    it starts at -G_r / gamma, a step of gradient descent at rate 1 / gamma

Nothing is subtracted: training begins a step away from the base.

Zhang, Liu and Chen 2025, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and Efficiently",
arXiv 2502.01235, algorithm 1; size='relative' is the official code (YuanheZ/LoRA-One).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits.base import Beginning, Calibration, Init, Statistics
from rankwise.inits.lora_ga import singular
from rankwise.updates import Site


@dataclass(frozen=True)
class LoraOne(Init):
    """The first step of full fine-tuning, cut to the rank.

    size: 'relative' to the largest singular value, so that the size of the loss does not matter, or as the 'gradient' is.
    gamma: divides the step; the larger, the nearer the start is to the base.
    estimate: 'full' sums the whole gradient; 'sketch' only ever holds thin products of it, in two sweeps over the data.
    svd: 'exact', 'randomized', or 'auto': exact up to a smaller side of 512, randomized above.
    calibration_rows: rows of the training data to take the gradient from.
    """

    name: ClassVar[str] = "lora-one"
    steps: ClassVar[bool] = True
    size: Literal["relative", "gradient"] = "relative"
    gamma: float = 128.0
    estimate: Literal["full", "sketch"] = "full"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    calibration_rows: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise RecipeError(f"gamma={self.gamma!r} of the lora-one init must be above 0; the official code has 128")

    @property
    def calibration(self) -> Calibration:
        return Calibration("gradient" if self.estimate == "full" else "gradient-sketch", self.calibration_rows)

    def notes(self, sites: Sequence[Site]) -> list[str]:
        return ["training begins one step of the gradient away from the base, so the start is not the base; disabled() still gives that"]

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert statistics is not None
        assert statistics.gradient is not None
        if statistics.tokens < site.rank:
            raise CalibrationError(
                f"{site.name} saw {statistics.tokens} calibration tokens, and {site.rank} directions of its gradient are needed; give more "
                "rows (method.calibration_rows), or lower the rank"
            )
        u, s, v = singular(statistics, site.rank, self.svd, generator)
        if not s[0] > 0:
            raise CalibrationError(
                f"the gradient at {site.name} is zero: the loss does not depend on it; exclude this site, or give labels it acts on"
            )
        # `singular` fixes the signs of u and of v each for itself; here they belong together
        rows = u if statistics.basis is None else statistics.basis.T @ u  # as the gradient's own rows are
        v = v * (rows * (statistics.gradient @ v)).sum(0).sign()
        if self.size == "relative":
            squared = s / s[0] / self.gamma
        else:
            squared = s * statistics.gradient.abs().max() / self.gamma / site.scaling
        return Beginning(squared.sqrt()[:, None] * v.T, -u * squared.sqrt())
