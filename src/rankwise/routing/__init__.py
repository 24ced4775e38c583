"""Routing axis: which updates act on which tokens? No recipe of this version routes; the value 'none' is the axis' origin."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Everywhere:
    """Every update acts on every token."""

    name: ClassVar[str] = "none"


ROUTINGS: dict[str, type[Everywhere]] = {Everywhere.name: Everywhere}
