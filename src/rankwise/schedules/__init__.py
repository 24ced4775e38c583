"""Schedule axis: when do rank, mask, subspace or structure change?"""

from rankwise.schedules.adalora import AdaLoraBudget
from rankwise.schedules.base import Change, Event, Moment, Running, Schedule, Sliced
from rankwise.schedules.none import Constant
from rankwise.schedules.task_growth import TaskGrowth

SCHEDULES: dict[str, type[Schedule]] = {schedule.name: schedule for schedule in (Constant, AdaLoraBudget, TaskGrowth)}

__all__ = ["SCHEDULES", "AdaLoraBudget", "Change", "Constant", "Event", "Moment", "Running", "Schedule", "Sliced", "TaskGrowth"]
