"""Instruction lists that have passed the checker, remembered for plans of equal form.

What a schedule writes, and whether its lists can run, depends on where stages sit and on which
edges lead where; edges' names and sizes change nothing. A search asks for the same few forms with
other cuts again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from raypar.schedules.base import Schedule, check_io
from raypar.schedules.check import check_lists
from raypar.schedules.compile import GRAD, compile_schedule
from raypar.schedules.instructions import Instruction
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.registry import get_schedule

_MOST_INSTRUCTIONS = 1_000_000
"""Longer lists than these together are not kept."""

Lists = list[list[Instruction]]

_known: OrderedDict[object, tuple[Schedule, tuple[str, ...], Lists]] = OrderedDict()


def checked_lists(name: str, io: StageIO, microbatches: int) -> Lists:
    """Compiles a schedule and walks its lists, or takes those of an equal form.

    Args:
        name: A registered schedule.
        io: The plan's stages.
        microbatches: M.

    Returns:
        One list per rank group (`raypar.schedules.compile`), as the checker has passed it.

    Raises:
        ScheduleError: The schedule does not take the plan, or its lists fail the checker.
    """
    check_io(io)
    schedule = get_schedule(name)
    key = (id(schedule), microbatches, io.rank_of, io.splits, tuple(_form(e) for e in io.edges))
    names = tuple(edge.name for edge in io.edges)
    found = _known.get(key)
    if found is None:
        lists = _checked(schedule, io, microbatches)
        _keep(key, schedule, names, lists)
        return lists
    _known.move_to_end(key)
    _, before, lists = found
    return [_renamed(program, dict(zip(before, names, strict=True))) for program in lists]


def _form(edge: Edge) -> tuple[int, tuple[int, ...], bool]:
    return edge.source, edge.targets, edge.differentiable


def _checked(schedule: Schedule, io: StageIO, microbatches: int) -> Lists:
    lists = compile_schedule(schedule, io, microbatches)
    check_lists(lists, io, microbatches)
    return lists


def _keep(key: object, schedule: Schedule, names: tuple[str, ...], lists: Lists) -> None:
    # With the schedule, whose id no other one has as long as it lives; a caller may change lists.
    _known[key] = schedule, names, [list(program) for program in lists]
    while sum(sum(map(len, kept)) for _, _, kept in _known.values()) > _MOST_INSTRUCTIONS:
        _known.popitem(last=False)


def _renamed(program: Sequence[Instruction], names: dict[str, str]) -> list[Instruction]:
    """The same instructions for edges of other names."""
    values = {**names, **{GRAD + old: GRAD + new for old, new in names.items()}}
    if all(old == new for old, new in names.items()):
        return list(program)
    return [
        now
        if now.value is None
        else Instruction(now.kind, now.stage, now.microbatch, values[now.value], now.peer)
        for now in program
    ]
