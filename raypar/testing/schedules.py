"""Conformance suite for schedules; a third party's schedule can run it too.

    import pytest
    from raypar.testing.schedules import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_schedule(check):
        check(MySchedule())

Every check draws random plans: stages placed anywhere, skip edges, values that several stages of
one rank group read, stages whose backward does not divide. Plans that `Schedule.check` refuses are
left out. Needs hypothesis (extra `dev`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from raypar.errors import ScheduleError
from raypar.schedules.base import Placement, Schedule, check_orders
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import COMPUTE, Instruction
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.text import draw, format_lists, parse_lists
from raypar.schedules.timing import Durations, ideal_timeline
from raypar.testing._replay import reference, replay

Lists = list[list[Instruction]]


def chain_io(
    n_stages: int, rank_groups: int, *, splits: bool | Sequence[bool] = True, nbytes: int = 1
) -> StageIO:
    """A plain chain: stage s on rank group s mod `rank_groups`, one edge between neighbours.

    Args:
        n_stages: Number of stages.
        rank_groups: Number of rank groups.
        splits: Whether backwards divide, for all stages or for each.
        nbytes: Size of every edge.
    """
    each = (splits,) * n_stages if isinstance(splits, bool) else tuple(splits)
    edges = tuple(Edge(f"x{s}", s, (s + 1,), True, nbytes) for s in range(n_stages - 1))
    return StageIO(n_stages, tuple(s % rank_groups for s in range(n_stages)), edges, each)


@st.composite
def stage_ios(draw: st.DrawFn, max_stages: int = 8, max_ranks: int = 4) -> StageIO:
    """Random plans as a schedule sees them: any placement, any forward edges."""
    n = draw(st.integers(1, max_stages))
    ranks = draw(st.lists(st.integers(0, max_ranks - 1), min_size=n, max_size=n))
    number = {rank: i for i, rank in enumerate(draw(st.permutations(sorted(set(ranks)))))}
    edges: list[Edge] = []
    for index in range(draw(st.integers(0, 2 * n)) if n > 1 else 0):
        source = draw(st.integers(0, n - 2))
        targets = draw(st.sets(st.integers(source + 1, n - 1), min_size=1, max_size=4))
        edges.append(
            Edge(
                f"layers.{index}/out:0",
                source,
                tuple(sorted(targets)),
                draw(st.booleans()),
                draw(st.integers(0, 100)),
            )
        )
    splits = tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return StageIO(n, tuple(number[rank] for rank in ranks), tuple(edges), splits)


plans = st.tuples(stage_ios(), st.integers(1, 9))
"""Strategy: a random `StageIO` and a number of microbatches."""


def _for_plans(schedule: Schedule, check: Callable[[StageIO, int], None], examples: int) -> None:
    """Runs `check` on random plans that the schedule accepts."""

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(plans)
    def each(plan: tuple[StageIO, int]) -> None:
        io, microbatches = plan
        try:
            schedule.check(Placement.of(io.rank_of), microbatches)
        except ScheduleError:
            assume(False)
        check(io, microbatches)

    each()


def keeps_the_contract(schedule: Schedule, examples: int = 100) -> None:
    """`orders` holds every action once, in an order that stages can follow; twice the same."""

    def check(io: StageIO, microbatches: int) -> None:
        placement = Placement.of(io.rank_of)
        orders = schedule.orders(placement, microbatches, io.splits)
        check_orders(schedule.name, orders, placement, microbatches)
        assert orders == schedule.orders(placement, microbatches, io.splits)

    _for_plans(schedule, check, examples)


def never_hangs_or_leaks(schedule: Schedule, examples: int = 100) -> None:
    """`check_lists` accepts what is compiled, also when every stage feeds every later one."""

    def check(io: StageIO, microbatches: int) -> None:
        n = io.n_stages
        full = tuple(Edge(f"all{s}", s, tuple(range(s + 1, n)), True, 8) for s in range(n - 1))
        dense = StageIO(n, io.rank_of, full, io.splits)
        for each in (io, dense):
            lists = compile_schedule(schedule, each, microbatches)
            report = check_lists(lists, each, microbatches)
            assert all(1 <= peak <= microbatches for peak in report.peak_in_flight)

    _for_plans(schedule, check, examples)


def computes_what_one_process_computes(schedule: Schedule, examples: int = 100) -> None:
    """Replayed with symbols for tensors, all gradients equal those of the unsplit model."""

    def check(io: StageIO, microbatches: int) -> None:
        lists = compile_schedule(schedule, io, microbatches)
        assert replay(lists, io, microbatches) == reference(io, microbatches)

    _for_plans(schedule, check, examples)


def prints_and_parses_back(schedule: Schedule, examples: int = 30) -> None:
    """The lists survive the trip through text, and can be drawn."""

    def check(io: StageIO, microbatches: int) -> None:
        lists = compile_schedule(schedule, io, microbatches)
        assert parse_lists(format_lists(lists)) == lists
        assert len(draw(lists).splitlines()) == len(lists)

    _for_plans(schedule, check, examples)


def takes_the_time_of_its_work(schedule: Schedule, examples: int = 30) -> None:
    """On the ideal timeline every rank group is busy for exactly its own work, in its order."""

    def check(io: StageIO, microbatches: int) -> None:
        lists = compile_schedule(schedule, io, microbatches)
        # Whole numbers, so that the sums are exact.
        times = Durations(
            tuple(float(1 + s % 3) for s in range(io.n_stages)),
            tuple(float(2 + s % 2) for s in range(io.n_stages)),
            tuple(float(1 + s % 4) for s in range(io.n_stages)),
        )
        timeline = ideal_timeline(lists, times.fused(io.splits), transfer=1.0)
        for rank, spans in enumerate(timeline.spans):
            held = [s for s in range(io.n_stages) if io.rank_of[s] == rank]
            work = sum(
                times.forward[s] + times.backward_input[s] + times.backward_weight[s] for s in held
            )
            assert timeline.busy[rank] == microbatches * work
            assert [span.instruction for span in spans] == [
                ins for ins in lists[rank] if ins.kind in COMPUTE
            ]
            assert all(a.end <= b.start for a, b in pairwise(spans))

    _for_plans(schedule, check, examples)


CHECKS: tuple[Callable[[Schedule], None], ...] = (
    keeps_the_contract,
    never_hangs_or_leaks,
    computes_what_one_process_computes,
    prints_and_parses_back,
    takes_the_time_of_its_work,
)
"""Every check of the suite; each raises if the schedule fails it."""
