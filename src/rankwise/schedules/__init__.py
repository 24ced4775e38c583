"""Schedule axis: when do rank, mask, subspace or structure change?

A schedule is an object with one method, called at named events. It returns what changed, and the loop acts on it. No recipe of this
version has
one yet; the events are fired by `rankwise.optimizer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

Event = Literal["calibrated", "backward", "step", "epoch", "task"]


@dataclass(frozen=True)
class Change:
    """What a schedule did: the parameters whose optimizer state must be reset."""

    reset: Sequence[nn.Parameter] = field(default=())


class Schedule(ABC):
    """Abstract: one value of the schedule axis."""

    name: ClassVar[str]

    @abstractmethod
    def on(self, event: Event, model: nn.Module, step: int) -> Change | None:
        """Called with the number of finished optimizer steps; returns what changed, or None."""


@dataclass(frozen=True)
class Constant(Schedule):
    """Nothing changes."""

    name: ClassVar[str] = "none"

    def on(self, event: Event, model: nn.Module, step: int) -> Change | None:
        return None


SCHEDULES: dict[str, type[Schedule]] = {Constant.name: Constant}
