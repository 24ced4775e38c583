"""Nothing changes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rankwise.schedules.base import Schedule


@dataclass(frozen=True)
class Constant(Schedule):
    """Rank, mask, subspace and structure stay."""

    name: ClassVar[str] = "none"

    def begin(self, model: nn.Module) -> None:
        return None
