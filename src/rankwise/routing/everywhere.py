"""No routing: every update acts on every token."""

from dataclasses import dataclass
from typing import ClassVar

from rankwise.routing.base import RoutingChoice


@dataclass(frozen=True)
class Everywhere(RoutingChoice):
    """Every update acts on every token."""

    name: ClassVar[str] = "none"
