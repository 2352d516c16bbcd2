"""Lists that are remembered are those that would be compiled."""

from __future__ import annotations

import pytest

from raypar.errors import ScheduleError
from raypar.schedules.checked import checked_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.io import Edge, StageIO


def _io(first: str, second: str, *, differentiable: bool = True, skip: bool = False) -> StageIO:
    edges = (
        Edge(first, 0, (1, 2) if skip else (1,), differentiable, 8),
        Edge(second, 1, (2,), True, 16),
    )
    return StageIO(3, (0, 1, 0), edges, (True, True, True))


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved_1f1b", "zero_bubble_h1"])
def test_plans_of_equal_form_have_equal_lists_but_for_names(name: str) -> None:
    for io in (_io("a", "b"), _io("b", "a"), _io("a", "b", skip=True), _io("c", "d", skip=True),
               _io("a", "b", differentiable=False), _io("x", "y")):  # fmt: skip
        for microbatches in (2, 3):
            assert checked_lists(name, io, microbatches) == compile_schedule(name, io, microbatches)


def test_a_caller_may_change_its_lists() -> None:
    io = _io("a", "b")
    for _ in range(2):
        checked_lists("1f1b", io, 2)[0].clear()
    assert checked_lists("1f1b", io, 2) == compile_schedule("1f1b", io, 2)


def test_names_are_looked_at_each_time() -> None:
    checked_lists("1f1b", _io("a", "b"), 2)
    with pytest.raises(ScheduleError, match="two edges"):
        checked_lists("1f1b", _io("a", "a"), 2)
