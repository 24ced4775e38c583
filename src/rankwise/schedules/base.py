"""What a schedule or a stateful gradient rule is: a frozen choice that begins a `Running`, which is called at named events.

Events reach it through the optimizer's step hooks, so that every loop fires them alike. It returns what it changed, and the
session acts on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

Event = Literal["calibrated", "backward", "step", "epoch", "task"]


@dataclass(frozen=True)
class Sliced:
    """A parameter that was replaced by a part of itself: its optimizer state is cut alike, so that training goes on."""

    was: nn.Parameter
    now: nn.Parameter
    index: Tensor  # what is kept, along `dim`
    dim: int


@dataclass(frozen=True)
class Change:
    """What was changed at an event.

    reset: parameters whose optimizer state must be forgotten. sliced: parameters that were replaced by parts of themselves.
    """

    reset: Sequence[nn.Parameter] = field(default=())
    sliced: Sequence[Sliced] = field(default=())


@dataclass(frozen=True)
class Moment:
    """When an event happens. `step` counts finished optimizer steps."""

    step: int
    optimizer: Optimizer


class Running(ABC):
    """Abstract: the state of a schedule or gradient rule over one run."""

    @abstractmethod
    def on(self, event: Event, moment: Moment) -> Change | None:
        """Called with 'backward' when the gradients of a step are final, with 'step' after the step, and so on."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run must have, counters included, as tensors by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave. Called after the model's own state was loaded."""
        assert not tensors, "a running schedule that saves tensors takes them back"

    def report(self) -> dict[str, float]:
        """Numbers for the metrics of the step that just ended, such as a penalty or a budget."""
        return {}


class Schedule(ABC):
    """Abstract: one value of the schedule axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]

    @abstractmethod
    def begin(self, model: nn.Module) -> Running | None:
        """The state of this schedule over an adapted model, when an optimizer is attached; None where nothing ever changes."""
