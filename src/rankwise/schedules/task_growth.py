"""One expert per task: at the event 'task' every site freezes the pair it has and gains a new one, whose guard is lifted step by step.

    o_n <- o_n (release - k - 1) / (release - k)      after step k = 0, 1, .. of the task: from the guard to zero in `release` steps

    selector penalty        selector_l1 * mean over sites of sum_i |D_i|_1     gradient selector_l1 / sites * sign(D_i)   (AM-LoRA, mode a)
    orthogonality penalty   orthogonality * sum_{i<n} |A_n A_i^T|_F^2 a site   gradient 2 orthogonality A_n A_i^T A_i     (O-LoRA)

AM-LoRA, arXiv 2409.19611; O-LoRA, Wang et al. 2023, arXiv 2310.14152, section 3. Both penalties are of parameters alone, so their
gradients are added in closed form when those of a step are final, and no loss contains them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.errors import RecipeError
from rankwise.schedules.base import Change, Event, Moment, Running, Schedule


class Growing(Running):
    """How many steps the task at hand has taken, and the penalties."""

    def __init__(self, choice: "TaskGrowth", sites: Mapping[str, Any]) -> None:
        self.choice, self.sites = choice, dict(sites)
        self.steps = 0
        self.penalty = 0.0

    @torch.no_grad()
    def on(self, event: Event, moment: Moment) -> Change | None:
        if event == "task":
            self.steps = 0
            return Change(grown=list(self.sites))
        if event == "backward":
            self.penalty = float(sum(self._penalise(module.update) for module in self.sites.values()))
        if event == "step":
            left = self.choice.release - self.steps
            for module in self.sites.values():
                offset = getattr(module.update, f"offset_{module.site.experts}", None)
                if offset is not None and left > 0:
                    offset.mul_((left - 1) / left)
            self.steps += 1
        return None

    def _penalise(self, update: Any) -> Tensor | float:
        total: Tensor | float = 0.0
        weight = self.choice.selector_l1 / len(self.sites)
        if weight:
            for name, parameter in update.named_parameters():
                if name.startswith("selector_") and parameter.grad is not None:
                    parameter.grad.add_(parameter.sign(), alpha=weight)
                    total = total + weight * parameter.abs().sum()
        newest = getattr(update, f"down_{update.experts}")
        if self.choice.orthogonality and update.experts > 1 and newest.grad is not None:
            earlier = torch.cat([getattr(update, f"down_{number}") for number in range(1, update.experts)])  # ((n - 1) rank, in)
            overlap = newest @ earlier.T
            newest.grad.add_(overlap @ earlier, alpha=2 * self.choice.orthogonality)
            total = total + self.choice.orthogonality * overlap.square().sum()
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.steps = int(tensors["steps"])

    def report(self) -> dict[str, float]:
        return {"penalty": self.penalty} if self.choice.selector_l1 or self.choice.orthogonality else {}


@dataclass(frozen=True)
class TaskGrowth(Schedule):
    """A new LoRA for every task of a sequence.

    release: steps in which the guard of a new LoRA is lifted, linearly in its log-odds.
    selector_l1: weight of the L1 norm of the selectors. orthogonality: weight of O-LoRA's penalty between the new `down` and the earlier.
    """

    name: ClassVar[str] = "task-growth"
    changes_experts: ClassVar[bool] = True
    release: int = 20
    selector_l1: float = 0.0
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        if self.release < 1:
            raise RecipeError(f"release={self.release} of the task-growth schedule must be at least 1 step; for no guard set guard=0")
        for label in ("selector_l1", "orthogonality"):
            if not 0 <= getattr(self, label) < float("inf"):
                raise RecipeError(f"{label}={getattr(self, label)} of the task-growth schedule must be at least 0")

    def begin(self, model: nn.Module) -> Running:
        from rankwise.sites import adapted_sites

        return Growing(self, adapted_sites(model))
