"""The gradient as it is."""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.gradients.base import GradientRule


@dataclass(frozen=True)
class Plain(GradientRule):
    """No change."""

    name: ClassVar[str] = "plain"
