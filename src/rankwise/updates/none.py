"""No update: the site has no factors, only a gain trains (Propulsion, or DoRA's magnitude alone)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rankwise.updates.base import Site, Slot, UpdateChoice


@dataclass(frozen=True)
class NoUpdate(UpdateChoice):
    """No factors at all."""

    name: ClassVar[str] = "none"
    module: ClassVar[Any] = None
    roles: ClassVar[frozenset[str]] = frozenset()
    own_start: ClassVar[bool] = True
    shareable: ClassVar[bool] = False
    scaled: ClassVar[bool] = False

    def slots(self, site: Site) -> dict[str, Slot]:
        return {}
