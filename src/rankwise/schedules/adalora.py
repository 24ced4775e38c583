"""AdaLoRA's budget: singular triplets compete over the whole model, and the least important ones are pruned.

    I = |w dL/dw|,   avg <- b1 avg + (1 - b1) I,   unc <- b2 unc + (1 - b2) |I - avg|,   s = avg * unc        for every entry w
    score of triplet i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij)
    budget(t) = b0                                                      t <= tinit
                bT + (b0 - bT) (1 - (t - tinit) / (T - tfinal - tinit))^3    until T - tfinal, then bT

Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512, equations 4 to 12 (equation 12 as the official code has it: the printed one does not meet
its own ends). After a step whose number is a multiple of `interval`, lam of all but the best budget(t) triplets is set to zero; they may
come back until T - tfinal, where the rest is cut out for good. P^T P and Q Q^T are pulled towards the identity by a penalty, whose
gradient is added in closed form when the gradients of a step are final (after clipping, if the loop clips), so no loss contains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from rankwise.errors import RecipeError, TrainingError
from rankwise.schedules.allocator import Allocator
from rankwise.schedules.base import Running, Schedule
from rankwise.updates.base import Site

if TYPE_CHECKING:
    from rankwise.recipe import Recipe


@dataclass(frozen=True)
class Phases:
    """The resolved numbers of a run: total steps, tinit, tfinal, interval."""

    total: int
    tinit: int
    tfinal: int
    interval: int

    def budget(self, step: int, first: int, last: int) -> int:
        """How many triplets may be non-zero after `step` (counted from 1), from `first` down to `last`."""
        if step <= self.tinit:
            return first
        if step >= self.total - self.tfinal:
            return last
        rest = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int(last + (first - last) * rest**3)


@dataclass(frozen=True)
class AdaLoraBudget(Schedule):
    """The budget of AdaLoRA.

    target_rank: mean rank at the end. The initial rank is the recipe's.
    tinit, tfinal: steps before the first and after the last pruning; None for a tenth and half of the run, about the paper's shares.
    interval: steps between two prunings; None for a 700th of the run. In between pruned triplets may grow again.
    total_steps: steps of the run; None takes what the loop or `rankwise.optimizer(total_steps=...)` says.
    beta1, beta2: smoothing of sensitivity and of its uncertainty.
    gamma: weight of the orthogonality penalty. orthogonality: 'fro_mean', the mean of the Frobenius norms over all P and Q (official code,
        PEFT), or 'fro2_sum', the sum of their squares (paper, equation 4).
    sensitivity: 'after' the step, |new w * gradient| (official code, PEFT), or 'before' it (paper, algorithm 1).
    compact: cut pruned triplets out when the last phase begins; False keeps them and sets them to zero after every step.
    """

    name: ClassVar[str] = "adalora"
    changes_ranks: ClassVar[bool] = True
    target_rank: int = 8
    tinit: int | None = None
    tfinal: int | None = None
    interval: int | None = None
    total_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    orthogonality: Literal["fro_mean", "fro2_sum"] = "fro_mean"
    sensitivity: Literal["after", "before"] = "after"
    compact: bool = True

    def __post_init__(self) -> None:
        for label, least in (("target_rank", 1), ("tinit", 0), ("tfinal", 0), ("interval", 1), ("total_steps", 1)):
            value = getattr(self, label)
            if value is not None and value < least:
                raise RecipeError(f"{label}={value} of the adalora schedule must be at least {least}")
        for label in ("beta1", "beta2"):
            if not 0 < getattr(self, label) < 1:
                raise RecipeError(f"{label}={getattr(self, label)} of the adalora schedule must lie between 0 and 1; the paper takes 0.85")
        if not 0 <= self.gamma < float("inf"):
            raise RecipeError(f"gamma={self.gamma} of the adalora schedule must be at least 0; the paper takes 0.1")
        if self.orthogonality not in ("fro_mean", "fro2_sum"):
            raise RecipeError(f"orthogonality={self.orthogonality!r} of the adalora schedule is unknown; use 'fro_mean' or 'fro2_sum'")
        if self.sensitivity not in ("after", "before"):
            raise RecipeError(f"sensitivity={self.sensitivity!r} of the adalora schedule is unknown; use 'after' or 'before'")

    def check(self, sites: Sequence[Site]) -> None:
        ranks = sum(site.rank for site in sites)
        if self.target_rank * len(sites) > ranks:
            raise RecipeError(
                f"target_rank={self.target_rank} of the adalora schedule is above the mean rank at the start, {ranks / len(sites):g}; "
                "lower it, or raise rank (AdaLoRA's init_rank)"
            )

    def decay(self, role: str) -> float:
        return 0.0 if role in ("down", "up") else 1.0  # decay pulls P and Q away from orthonormal

    def state_bytes(self, recipe: "Recipe", sites: Sequence[Site]) -> int:
        slots = [(slot, max(4, site.element)) for site in sites for slot in recipe.update.slots(site).values()]
        return sum(2 * element * slot.numel for slot, element in slots if slot.trains(recipe.frozen_roles))  # both averages

    def phases(self, total_steps: int | None) -> Phases:
        """The numbers of a run of so many steps.

        Raises:
            TrainingError: the number of steps is unknown, differs from `total_steps`, or leaves no step for pruning.
        """
        if self.total_steps is not None and total_steps is not None and self.total_steps != total_steps:
            raise TrainingError(
                f"total_steps={self.total_steps} of the adalora schedule, but the run takes {total_steps} steps; leave total_steps out"
            )
        total = self.total_steps if total_steps is None else total_steps
        if total is None:
            raise TrainingError(
                "the adalora schedule must know how many steps the run takes; pass total_steps=... to rankwise.optimizer or "
                "rankwise.attach, or set total_steps in the recipe"
            )
        tfinal = total // 2 if self.tfinal is None else self.tfinal
        tinit = max(0, min(max(1, total // 10), total - tfinal - 1)) if self.tinit is None else self.tinit
        if tinit >= total - tfinal:
            raise TrainingError(
                f"tinit={tinit} and tfinal={tfinal} of the adalora schedule leave no step for pruning in a run of {total} steps; lower "
                "them or train longer"
            )
        return Phases(total, tinit, tfinal, max(1, total // 700) if self.interval is None else self.interval)

    def begin(self, model: nn.Module) -> Running:
        from rankwise.sites import adapted_sites

        return Allocator(self, adapted_sites(model))
