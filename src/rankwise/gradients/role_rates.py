"""Discrepant learning rates: each role's rate and, with it, its decoupled weight decay, times a constant.

    lr(role) = rates[role] * lr

Yaras et al. 2024 ("Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", arXiv 2406.04112, section 4) move the
outer factors `down` and `up` at gamma times the rate of the core. Applied at step time, so that no scheduler can destroy it. A role that
shall not move at all is frozen instead (`frozen`), which then keeps nothing for its gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from rankwise.errors import RecipeError
from rankwise.gradients.base import GradientRule


@dataclass(frozen=True)
class RoleRates(GradientRule):
    """What the learning rate of each role is multiplied by; `other` is what belongs to no adapter, such as a classification head."""

    name: ClassVar[str] = "role-rates"
    down: float = 1.0
    up: float = 1.0
    core: float = 1.0
    tail: float = 1.0
    gain: float = 1.0
    other: float = 1.0

    def __post_init__(self) -> None:
        for role, rate in vars(self).items():
            if not 0 < rate < math.inf:
                raise RecipeError(f"{role}={rate!r} of role-rates must be above 0; to hold a role still, freeze it: frozen={{{role!r}}}")

    def rate(self, role: str) -> float:
        return float(getattr(self, role, 1.0)) if role in vars(self) else 1.0
