"""Schedule axis: when do rank, mask, subspace or structure change?"""

from rankwise.schedules.adalora import AdaLoraBudget
from rankwise.schedules.base import Change, Event, Moment, Running, Schedule, Sliced
from rankwise.schedules.galore import GaloreFolding
from rankwise.schedules.none import Constant
from rankwise.schedules.rosa import Rounds

SCHEDULES: dict[str, type[Schedule]] = {schedule.name: schedule for schedule in (Constant, AdaLoraBudget, GaloreFolding, Rounds)}

__all__ = [
    "SCHEDULES",
    "AdaLoraBudget",
    "Change",
    "Constant",
    "Event",
    "GaloreFolding",
    "Moment",
    "Rounds",
    "Running",
    "Schedule",
    "Sliced",
]
