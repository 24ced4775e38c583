"""GaLore: every step is folded into the weight, and the subspace that steps are taken in follows the gradient.

    every T steps   P <- rank leading singular vectors of G, on the site's side            G (out, in): the weight's gradient
    every step      R = P^T G,  N = the optimizer's step on R,  W <- (1 - lr decay) (W - lr scale P N)     (right side: G P and N P^T)

Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507, algorithm 2. The site's factors
are P and a D that is zero in every forward (`updates/projected.py`), so autograd gives R as D's gradient, the optimizer writes -lr N into
D, and here scale * P D is folded into W. Moments belong to D and stay as they are at a refresh (`rotate` carries them over instead).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from rankwise.errors import RecipeError
from rankwise.schedules.base import Running, Schedule
from rankwise.updates.base import Site


@dataclass(frozen=True)
class GaloreFolding(Schedule):
    """Folding after every step, and refreshed frames.

    update_interval: steps from one refresh of a site's frame to the next (T).
    scale: multiplies what is folded, so the learning rate of the adapted weights (the paper's alpha). Weight decay is not scaled.
    method: 'randomized', a range finder first and then one subspace iteration from the frame at hand; 'svd', exact, as in the paper;
        'random', an orthonormal frame whatever the gradient.
    stagger: refresh the sites one after another over the interval, so that no step has all of it. False: all at once, as in the paper.
    rotate: carry Adam's moments over into the new frame. False: leave them as they are, as in the paper.
    align: flip new columns that point away from their predecessors. The official code does not.
    refresh_on: 'first-batch' takes the frame from the first gradient that arrives at the site in a step and frees it at once; 'step' from
        the gradient summed over all batches of an accumulated step, as the official code: the full gradients of all sites that are due are
        then held together, and the frame is made again with every batch.
    rounding: of 16-bit weights, 'nearest' or 'stochastic'; 'auto' is stochastic for bf16, whose steps would else be lost below 2^-9 |w|.
    original: 'keep' the weights of before on the CPU, or 'drop' them (pretraining).
    """

    name: ClassVar[str] = "galore"
    rewrites_base: ClassVar[bool] = True
    update_interval: int = 200
    scale: float = 0.25
    method: Literal["randomized", "svd", "random"] = "randomized"
    stagger: bool = True
    rotate: bool = False
    align: bool = True
    refresh_on: Literal["first-batch", "step"] = "first-batch"
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    original: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.update_interval < 1:
            raise RecipeError(f"update_interval={self.update_interval} of the galore schedule must be at least 1; the paper takes 200")
        if not 0 < self.scale < math.inf:
            raise RecipeError(f"scale={self.scale} of the galore schedule must be above 0; the paper takes 0.25")
        for label, known in (
            ("method", ("randomized", "svd", "random")),
            ("refresh_on", ("first-batch", "step")),
            ("rounding", ("auto", "nearest", "stochastic")),
            ("original", ("keep", "drop")),
        ):
            if getattr(self, label) not in known:
                raise RecipeError(f"{label}={getattr(self, label)!r} of the galore schedule is unknown; use one of {', '.join(known)}")

    def decay(self, role: str) -> float:
        return 0.0 if role in ("down", "up") else 1.0  # the whole weight decays, when it is folded; D is zero anyway

    def notes(self, sites: Sequence[Site]) -> list[str]:
        wide = [site for site in sites if 2 * site.rank > min(site.in_features, site.out_features)]
        notes = []
        if wide:
            notes.append(
                f"the rank is more than half of the smaller side at {len(wide)} sites, such as {wide[0].name}, where the frame and the "
                "moments save little or nothing over AdamW's full moments"
            )
        if biased := [site for site in sites if site.has_bias]:
            notes.append(f"the biases of {len(biased)} adapted layers, such as {biased[0].name}, do not train")
        return notes

    def due(self, step: int, index: int, count: int) -> bool:
        """Whether the frame of site number `index` of `count` is renewed with the gradient of step number `step`, counted from 0."""
        offset = index * self.update_interval // count if self.stagger else 0
        return step == 0 or step % self.update_interval == offset % self.update_interval

    def begin(self, model: nn.Module) -> Running:
        from rankwise.schedules.frames import Frames

        return Frames(self, model)
