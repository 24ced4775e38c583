"""What a schedule or a stateful gradient rule is: a frozen choice that begins a `Running`, which is called at named events.

Events reach it through the optimizer's step hooks, so that every loop fires them alike. It returns what it changed, and the
session acts on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from rankwise.inits import Beginning
    from rankwise.planning import Plan
    from rankwise.recipe import Recipe
    from rankwise.updates import Site

_many: Any = torch  # its functions over lists of tensors are not in its stubs

Event = Literal["calibrated", "backward", "step", "epoch", "task"]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite: by the sum of squares, whose norm a CPU computes five times as fast, and where that is not finite,
    by the largest number."""
    for kind in (2.0, float("inf")):
        norms = _many._foreach_norm(list(tensors), kind)
        if bool(torch.isfinite(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])).all()):
            return True
    return False


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
    ranks: site name -> positions of the ranks that stay, to be cut by the session (`resizing.resize`), optimizer state and all.
    grown: names of sites that gain one expert (`resizing.grow`); the optimizer takes its tensors in and lets those go that froze.
    """

    reset: Sequence[nn.Parameter] = field(default=())
    sliced: Sequence[Sliced] = field(default=())
    ranks: Mapping[str, Tensor] = field(default_factory=dict)
    grown: Sequence[str] = field(default=())


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

    def expect(self, total_steps: int | None) -> None:
        """Called once before the first event: how many steps the run will take, None where nobody said.

        Raises:
            TrainingError: it must be known here.
        """
        return

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run must have, counters included, as tensors by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave. Called after the model's own state was loaded."""
        assert not tensors, "a running schedule that saves tensors takes them back"

    def close(self) -> None:
        """Takes off whatever was put on the model; called when the session ends or another one takes its place."""
        return

    def report(self) -> dict[str, float]:
        """Numbers for the metrics of the step that just ended, such as a penalty or a budget."""
        return {}


@dataclass(frozen=True)
class Sample:
    """What a schedule asks of the training data before training.

    share: of the rows, stratified, at least one of each stratum. strata: 'label' for classes, 'length' for five classes of length, 'none',
    or 'auto', the first that the data has.
    """

    share: float
    strata: Literal["auto", "label", "length", "none"]


@dataclass(frozen=True)
class Allocation:
    """What a schedule decided before training: which sites have which update, and with which values some of them begin.

    warm: site name -> parameter name within the site -> its value; other sites begin as the init says.
    """

    plan: "Plan"
    warm: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Schedule(ABC):
    """Abstract: one value of the schedule axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]
    #: whether ranks may change while training, so that a saved adapter may hold fewer than its recipe says
    changes_ranks: ClassVar[bool] = False
    #: whether sites may gain experts while training, so that a saved adapter may hold more than its recipe begins with
    changes_experts: ClassVar[bool] = False
    #: whether it writes what the factors have learned into the base weights while training
    rewrites_base: ClassVar[bool] = False
    #: for a schedule that rewrites the base: 'keep' a copy of the original weights on the CPU, so that `disabled` and `unadapt` give the
    #: base back bit for bit, or 'drop' them, where there is nothing to go back to
    original: Literal["keep", "drop"] = "keep"
    #: for one that rewrites the base in rounds (`folding.renew`): 'fp32' sums the weight up in an fp32 copy on the CPU
    master: Literal["none", "fp32"] = "none"
    #: and whether what was folded is kept as low-rank pairs, so that files hold these instead of base weights
    ledger: bool = False

    def bound(self, rank: int, side: int) -> int:
        """The rank that a site with this smaller side can have under this schedule, at most `rank`; `plan` lowers it."""
        return rank

    def held(self, sites: "Sequence[Site]") -> dict[str, int]:
        """Label -> bytes of what the schedule keeps beside the adapters, for a plan's forecast."""
        return {}

    def check(self, sites: "Sequence[Site]") -> None:
        """Raises RecipeError where the options do not fit these sites; called by `plan`."""
        return

    def notes(self, sites: "Sequence[Site]") -> list[str]:
        """What a plan should say of these sites."""
        return []

    @property
    def sample(self) -> Sample | None:
        """The data by which this schedule changes the plan before anything is built (`allocate`); None where it does not."""
        return None

    def allocate(
        self, model: nn.Module, made: "Plan", batches: Sequence[Mapping[str, Any]] | None, begun: "Mapping[str, Beginning] | None"
    ) -> Allocation:
        """Changes a plan by what real data show; called by `adapt`, once, where `sample` is not None.

        Args:
            model: the base, not adapted; left as it is.
            made: the plan of all sites.
            batches: as the model takes them, with labels; None where the caller gave none.
            begun: site name -> starting pair, of an init that needed calibration.

        Raises:
            CalibrationError: batches that are missing or of no use.
        """
        return Allocation(made)

    def decay(self, role: str) -> float:
        """What the weight decay of a role is multiplied by, beside what the gradient rule says."""
        return 1.0

    def state_bytes(self, recipe: "Recipe", sites: "Sequence[Site]") -> int:
        """Bytes that a run of this schedule keeps beside the optimizer's moments, for the forecast of memory."""
        return 0

    @abstractmethod
    def begin(self, model: nn.Module) -> Running | None:
        """The state of this schedule over an adapted model, when an optimizer is attached; None where nothing ever changes."""
