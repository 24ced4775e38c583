"""LoRA+: the factor on the output side learns `ratio` times faster.

    lr(up) = ratio * lr(down)

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4. Output-side roles are `up` and
VeRA's `tail`;
magnitudes, mixers, heads and `down` keep the base rate. The ratio is applied at step time, so that no scheduler can destroy it.
"""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.errors import RecipeError
from rankwise.gradients.base import GradientRule

OUTPUT_SIDE = frozenset({"up", "tail"})


@dataclass(frozen=True)
class LoraPlus(GradientRule):
    """A larger rate for the output side.

    ratio: the paper recommends 16; the official scripts use 10, 20 and 80.
    scale_weight_decay: divides the output side's decay by the ratio, so that both factors shrink alike per step (decoupled decay shrinks by
    lr * decay); False is the literal behaviour.
    """

    name: ClassVar[str] = "lora-plus"
    ratio: float = 16.0
    scale_weight_decay: bool = True

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise RecipeError(f"ratio={self.ratio} of lora-plus must be at least 1; the paper recommends 16")

    def rate(self, role: str) -> float:
        return self.ratio if role in OUTPUT_SIDE else 1.0

    def decay(self, role: str) -> float:
        return 1 / self.rate(role) if self.scale_weight_decay else 1.0
