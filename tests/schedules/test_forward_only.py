"""Lists that only evaluate: the schedule, the compiler, and the checker that walks them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.errors import ScheduleError
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.forward_only import ForwardOnly
from raypar.schedules.instructions import Kind
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.registry import schedule_names
from raypar.schedules.text import format_lists, parse_lists


@st.composite
def _plans(draw):
    groups = draw(st.integers(1, 4))
    rank_of = (*range(groups), *draw(st.lists(st.integers(0, groups - 1), max_size=5)))
    rank_of = tuple(draw(st.permutations(rank_of)))
    count = len(rank_of)
    edges = [Edge(f"e{s}", s, (s + 1,), False, 4) for s in range(count - 1)]
    if count > 2:
        edges.append(Edge("skip", 0, tuple(range(2, count)), False, 8))
    return StageIO(count, rank_of, tuple(edges), (False,) * count), draw(st.integers(1, 6))


@given(_plans())
def test_every_placement_runs_and_nothing_is_left(plan):
    io, microbatches = plan
    lists = compile_schedule(ForwardOnly(), io, microbatches)
    report = check_lists(lists, io, microbatches, trains=False)
    assert report.peak_in_flight == (0,) * io.n_stages
    kinds = {ins.kind for program in lists for ins in program}
    allowed = {Kind.GLOBALS, Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.FREE}
    assert kinds <= allowed
    assert parse_lists(format_lists(lists)) == lists


def test_a_pipeline_fills_and_flows():
    io = StageIO(2, (0, 1), (Edge("x", 0, (1,), False, 4),), (False, False))
    lists = compile_schedule(ForwardOnly(), io, 2)
    assert format_lists(lists) == (
        "0: GLOBALS 0F0 0SF0[x>1] 0DEL0[x] 0F1 0SF1[x>1] 0DEL1[x]\n"
        "1: GLOBALS 1RF0[x<0] 1F0 1DEL0[x] 1RF1[x<0] 1F1 1DEL1[x]\n"
    )


def test_the_deepest_stage_of_a_rank_group_goes_first():
    io = StageIO(3, (0, 1, 0), (), (False,) * 3)
    (first, _) = compile_schedule(ForwardOnly(), io, 3)
    order = [str(ins) for ins in first if ins.kind is Kind.FORWARD]
    assert order == ["0F0", "0F1", "2F0", "2F1", "0F2", "2F2"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0: GLOBALS 0F0\n", "1 of 2 forwards"),
        ("0: GLOBALS 0F0 0F1 0B0\n", "there is no backward"),
        ("0: GLOBALS 0F0 0F1 NORM\n", "GLOBALS first, once"),
        ("0: 0F0 0F1\n", "before GLOBALS"),
        ("0: GLOBALS 0F1 0F0\n", "next forward is microbatch 0"),
    ],
)
def test_faults_are_found(text, why):
    io = StageIO(1, (0,), (), (False,))
    with pytest.raises(ScheduleError, match=why):
        check_lists(parse_lists(text), io, 2, trains=False)


def test_no_plan_can_name_it():
    assert ForwardOnly.name not in schedule_names()
