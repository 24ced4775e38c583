"""Init axis: where do the factors start? A choice is a pure function (site, weight, statistics, generator) -> a starting pair."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rankwise.updates import Site


class Beginning(NamedTuple):
    """The starting pair of one site, without `scaling` applied: the update begins at scaling * up @ down."""

    down: Tensor | None  # (rank, in)
    up: Tensor | None  # (out, rank)
    notes: tuple[str, ...] = ()  # what the user should know, such as replaced dead directions


class Init(ABC):
    """Abstract: one value of the init axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]
    #: the pair's product is not zero, so a start must be subtracted (base='keep') or folded into the base (base='fold')
    moves_base: ClassVar[bool] = False
    #: the frozen weight must be read
    needs_weight: ClassVar[bool] = False
    #: the init makes no pair, because the update brings its own values
    own: ClassVar[bool] = False

    @abstractmethod
    def begin(self, site: Site, weight: Tensor | None, statistics: Any, generator: torch.Generator) -> Beginning:
        """The starting pair.

        Args:
            site: shapes, rank and scaling.
            weight: the dense frozen weight (out, in), only where `needs_weight`.
            statistics: what calibration gathered for this site, for inits that ask for it.
            generator: a CPU generator of the site's own, seeded from the run's seed and the site's name.
        """


def site_generator(seed: int, name: str, purpose: str = "init") -> torch.Generator:
    """A CPU generator that depends on the seed and the site's name only: not on order, device or the global state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
