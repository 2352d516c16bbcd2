"""Names → schedules."""

from __future__ import annotations

from raypar.errors import ScheduleError, did_you_mean
from raypar.schedules.base import Schedule
from raypar.schedules.eager_1f1b import EagerOneFOneB
from raypar.schedules.gpipe import GPipe
from raypar.schedules.interleaved_1f1b import InterleavedOneFOneB
from raypar.schedules.interleaved_eager import InterleavedEager
from raypar.schedules.interleaved_zero_bubble import InterleavedZeroBubble
from raypar.schedules.one_f_one_b import OneFOneB
from raypar.schedules.zero_bubble_h1 import ZeroBubbleH1

_schedules: dict[str, Schedule] = {}


def register(schedule: Schedule) -> None:
    """Makes a schedule known by its `name`.

    Raises:
        ScheduleError: It is no `Schedule` instance, has no name, or the name is taken by another
            class.
    """
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"register() takes an instance of a raypar.schedules.base.Schedule subclass, "
            f"found {schedule!r}"
        )
    name = getattr(schedule, "name", None)
    if not isinstance(name, str) or not name:
        raise ScheduleError(f"{type(schedule).__name__} needs a class attribute `name`, a string")
    known = _schedules.get(name)
    if known is not None and type(known) is not type(schedule):
        raise ScheduleError(
            f"schedule name {name!r} is taken by {type(known).__module__}."
            f"{type(known).__name__}: give {type(schedule).__name__} another `name`"
        )
    _schedules[name] = schedule


def schedule_names() -> tuple[str, ...]:
    """The registered names, in order of registration."""
    return tuple(_schedules)


def get_schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ScheduleError: No such schedule; the text lists the valid names.
    """
    found = _schedules.get(name)
    if found is None:
        raise ScheduleError(
            f"unknown schedule {name!r}.{did_you_mean(name, _schedules)} "
            f"Valid for train.schedule: {', '.join(_schedules)}"
        )
    return found


for _schedule in (
    GPipe(),
    OneFOneB(),
    EagerOneFOneB(),
    InterleavedOneFOneB(),
    ZeroBubbleH1(),
    InterleavedZeroBubble(),
    InterleavedEager(),
):
    register(_schedule)
