"""Schedule axis: when do rank, mask, subspace or structure change?"""

from rankwise.schedules.base import Change, Event, Moment, Running, Schedule, Sliced
from rankwise.schedules.none import Constant

SCHEDULES: dict[str, type[Schedule]] = {schedule.name: schedule for schedule in (Constant,)}

__all__ = ["SCHEDULES", "Change", "Constant", "Event", "Moment", "Running", "Schedule", "Sliced"]
