"""Gradient axis: how do gradients become steps? Rules address roles (down, up, core, tail, gain, gate), never parameter names."""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from rankwise.schedules.base import Running

if TYPE_CHECKING:
    from rankwise.recipe import Recipe
    from rankwise.updates import Site


class GradientRule(ABC):
    """Abstract: one value of the gradient axis. Final subclasses are frozen dataclasses of options; they hold no state."""

    name: ClassVar[str]

    def rate(self, role: str) -> float:
        """What the learning rate of a role is multiplied by, at each step, whatever a scheduler wrote."""
        return 1.0

    def decay(self, role: str) -> float:
        """What the weight decay of a role is multiplied by."""
        return 1.0

    @property
    def direct(self) -> frozenset[str]:
        """Roles whose gradients this rule makes into steps: the optimizer moves them by lr times that, and keeps no moments of them."""
        return frozenset()

    def state_bytes(self, recipe: "Recipe", sites: "Sequence[Site]") -> int:
        """Bytes that a run of this rule keeps beside the optimizer's moments, for the forecast of memory."""
        return 0

    def transform(self, site: nn.Module, role: str) -> Callable[[Tensor], Tensor] | None:
        """A linear map on each incoming gradient of a role at one site (an AdaptedLinear), before accumulation and clipping; or None."""
        return None

    def begin(self, model: nn.Module) -> Running | None:
        """The state of a rule that couples parameters or remembers past steps, called at the events of a session; None for most."""
        return None
