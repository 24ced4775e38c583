"""The update brings its own starting values (VeRA's vectors), or there is nothing to start (a gain alone)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.inits.base import Beginning, Init, Statistics
from rankwise.updates import Site


@dataclass(frozen=True)
class Own(Init):
    """No pair."""

    name: ClassVar[str] = "own"
    own: ClassVar[bool] = True

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        return Beginning(None, None)
