"""LoRA-Pro: the gradients of `down` and `up` are replaced by the pair of steps that moves W most like full fine-tuning would.

    factor space   h_down, h_up of `equivalent.py` go to the optimizer in place of the gradients
    weight space   gt = s (up h_down + h_up down);   m <- b1 m + (1 - b1) gt;   v <- b2 v + (1 - b2) gt^2              (out, in)
                   N = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps);   h from s up^T N and s N down^T;   factor -= lr h

Wang et al. 2024, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242, section 2 and algorithms 1 and 2. Weight space is
AdamW of the weight itself, so it keeps the moments of full fine-tuning; factor space keeps LoRA's. The running state is in
`equivalent_state.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from rankwise.errors import RecipeError
from rankwise.gradients.base import GradientRule
from rankwise.gradients.equivalent import Mix
from rankwise.gradients.equivalent_state import running
from rankwise.gradients.moments import States, bytes_of
from rankwise.schedules.base import Running

if TYPE_CHECKING:
    from rankwise.recipe import Recipe
    from rankwise.updates import Site


@dataclass(frozen=True)
class LoraPro(GradientRule):
    """The equivalent gradient.

    adam_space: 'factor' hands the adjusted gradients to the optimizer; 'weight' is the paper's algorithm 2, Adam on the equivalent gradient
        of the whole weight, whose two moments are as large as the weight.
    x: the free matrix X: 'sylvester' (nearest to the raw gradients; the paper's), 'symmetric', 'zero'.
    cap: bound on ||lr h|| of the larger factor at a site, as a multiple of that factor's own norm; None for the paper's step, which has
        none. From up = 0, the second step in weight space would otherwise move `down` by a third of itself, whatever lr is.
    ridge: added to the Gram matrices' eigenvalues as a multiple of their mean; 0 is exact.
    weight_decay: what the optimizer's weight_decay does: 'adapter' takes half of it at each factor, so that their product shrinks by
        1 - lr * weight_decay (but for the square of half of that); 'none' leaves both alone. The base never decays.
    beta1, beta2, eps: of Adam in weight space. states: how its moments are held: 'fp32' (fp64 on an fp64 base); '8bit', blockwise codes;
        'factored', codes of the first and the row and column means of the second.
    tile: rows of the weight that are worked on at once in weight space; None for 1 MiB of them on a CPU, 64 MiB elsewhere.
    """

    name: ClassVar[str] = "lora-pro"
    adam_space: Literal["factor", "weight"] = "factor"
    x: Mix = "sylvester"
    cap: float | None = 0.1
    ridge: float = 0.0
    weight_decay: Literal["adapter", "none"] = "adapter"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    states: States = "fp32"
    tile: int | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "adam_space": ("factor", "weight"),
            "x": ("sylvester", "symmetric", "zero"),
            "weight_decay": ("adapter", "none"),
            "states": ("fp32", "8bit", "factored"),
        }
        for label, values in known.items():
            if getattr(self, label) not in values:
                raise RecipeError(f"{label}={getattr(self, label)!r} of lora-pro is unknown; use one of {', '.join(map(repr, values))}")
        if self.cap is not None and not self.cap > 0:
            raise RecipeError(f"cap={self.cap} of lora-pro must be above 0; leave it at 0.1, or None for the paper's unbounded step")
        if not 0 <= self.ridge < float("inf"):
            raise RecipeError(f"ridge={self.ridge} of lora-pro must be at least 0, which is exact")
        if not 0 < self.eps < float("inf"):
            raise RecipeError(f"eps={self.eps} of lora-pro must be above 0: an entry whose gradient was always zero divides by it")
        for label in ("beta1", "beta2"):
            if not 0 <= getattr(self, label) < 1:
                raise RecipeError(f"{label}={getattr(self, label)} of lora-pro must be at least 0 and below 1")
        if self.tile is not None and self.tile < 1:
            raise RecipeError(f"tile={self.tile} of lora-pro must be at least 1 row; leave it out for a size that fits most machines")

    @property
    def direct(self) -> frozenset[str]:
        return frozenset({"down", "up"}) if self.adam_space == "weight" else frozenset()

    def decay(self, role: str) -> float:
        if role not in ("down", "up"):
            return 1.0
        return 0.5 if self.weight_decay == "adapter" else 0.0

    def state_bytes(self, recipe: "Recipe", sites: "Sequence[Site]") -> int:
        if self.adam_space == "factor":
            return 0
        own = [site for site in sites if not site.owner]
        return sum(bytes_of(self.states, site.out_features, site.in_features, max(4, site.element)) for site in own)

    def begin(self, model: nn.Module) -> Running:
        return running(self, model)
