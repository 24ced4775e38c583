"""What a routing choice is, and what a gate at a transformer block is.

A gate at a block reads the hidden states that enter it, (batch, length, width), and gives one weight c (batch, sites) for each adapted
linear layer inside. Such a weight multiplies the whole update of its site, start included, so that c = 0 is the true base:

    y = W x + c (scaling up core down x - scaling up0 down0 x) + bias

Gates that look at single tokens at one site are updates with a token core; they need no gate module here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.updates.base import Part, Slot

if TYPE_CHECKING:
    from rankwise.context import BatchContext
    from rankwise.schedules import Running

GATE = "rankwise_gate"  # under this name a gate stands on its block


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block that has a gate: names and shapes, no tensor."""

    name: str  # dotted module path
    width: int  # of the hidden states that enter it
    sites: tuple[str, ...]  # names of the adapted layers inside, in the model's order


class BlockGate(Part, ABC):
    """Abstract: the gate of one block. Final subclasses say what the weights are."""

    def __init__(self, choice: Any, block: Block, frozen: frozenset[str], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(choice.slots(block), frozen, device, dtype)
        self.choice = choice
        self.block = block
        self.enabled = True

    @abstractmethod
    def begin(self, generator: torch.Generator) -> None:
        """Starting values."""

    @abstractmethod
    def forward(self, hidden: Tensor, context: "BatchContext") -> Tensor:
        """c (batch, sites) from hidden states (batch, length, width)."""


class RoutingChoice(ABC):
    """Abstract: one value of the routing axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]
    #: the gate that stands on every block with adapted layers; None where no block has one
    module: ClassVar[type[BlockGate] | None] = None

    @property
    def wants_validation(self) -> bool:
        """Whether training takes batches of held-out rows as well."""
        return False

    def slots(self, block: Block) -> dict[str, Slot]:
        """The tensors that the gate of one block owns."""
        return {}

    def check(self, blocks: Sequence[Block]) -> None:
        """Raises RecipeError where the options do not fit these blocks; called by `plan`."""
        return

    def begin(self, model: Any, validation: Any) -> "Running | None":
        """The state of this choice over one run, where an optimizer is attached; None where it has none.

        Args:
            model: the adapted model.
            validation: batches of held-out rows, where the caller has any.
        """
        return None
