"""Gain axis: are rows of base and branch rescaled? A gain stands beside the update, so that it composes with any constant core."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.equation import Factors, Start
from rankwise.storage import Storage
from rankwise.updates import Part, Site, Slot


class Gain(Part, ABC):
    """Abstract: the row gain of one site."""

    def __init__(self, choice: Any, site: Site, frozen: frozenset[str], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(choice.slots(site), frozen, device, dtype)
        self.choice = choice

    @abstractmethod
    def begin(
        self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None, original: Tensor | None = None
    ) -> None:
        """Measures what the gain needs of the frozen weight and sets the gain to exactly 1. `start` as the forward subtracts it;
        `original` is the dense weight (out, in) before it was quantized, for a choice that needs it."""

    @abstractmethod
    def forward(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        """The gain (out,), in fp32."""

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """Slot name -> what an adapter file holds (for DoRA the magnitude itself, not its delta)."""

    @abstractmethod
    def restore(self, **values: Tensor) -> None:
        """Takes back what `saved` gave, after `begin`: the gain is then bit for bit what it was."""

    def anchors(self) -> dict[str, Tensor]:
        """Buffer name -> tensor, of what the trained numbers are measured from; kept with them when a run is to be resumed."""
        return {}


class GainChoice(ABC):
    """Abstract: one value of the gain axis."""

    name: ClassVar[str]
    module: ClassVar[type[Gain] | None]

    @property
    def needs_original(self) -> bool:
        """Whether the gain begins from the weight before it is quantized; the gain is then not exactly 1 on a quantized base."""
        return False

    @abstractmethod
    def slots(self, site: Site) -> dict[str, Slot]:
        """The tensors that one site owns."""
