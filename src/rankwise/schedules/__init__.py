"""Schedule axis: when do rank, mask, subspace or structure change?"""

from rankwise.schedules.adalora import AdaLoraBudget
from rankwise.schedules.base import Allocation, Change, Event, Moment, Running, Sample, Schedule, Sliced
from rankwise.schedules.galore import GaloreFolding
from rankwise.schedules.lora_drop import LoraDrop
from rankwise.schedules.none import Constant
from rankwise.schedules.rosa import Rounds
from rankwise.schedules.task_growth import TaskGrowth

SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Constant, AdaLoraBudget, GaloreFolding, Rounds, LoraDrop, TaskGrowth)
}

__all__ = [
    "SCHEDULES",
    "AdaLoraBudget",
    "Allocation",
    "Change",
    "Constant",
    "Event",
    "GaloreFolding",
    "LoraDrop",
    "Moment",
    "Rounds",
    "Running",
    "Sample",
    "Schedule",
    "Sliced",
    "TaskGrowth",
]
