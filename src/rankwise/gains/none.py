"""No gain: rows keep their length."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rankwise.gains.base import GainChoice
from rankwise.updates import Site, Slot


@dataclass(frozen=True)
class NoGain(GainChoice):
    """No gain."""

    name: ClassVar[str] = "none"
    module: ClassVar[Any] = None

    def slots(self, site: Site) -> dict[str, Slot]:
        return {}
