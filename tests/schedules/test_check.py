"""The checker finds every fault that is put into good lists, and says where it is."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import ScheduleError
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import COMPUTE, Instruction
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.registry import schedule_names
from raypar.schedules.text import parse_lists
from raypar.testing._replay import reference, replay
from raypar.testing.schedules import chain_io, stage_ios
from tests._tiers import examples

Lists = list[list[Instruction]]
SMALL = st.tuples(st.sampled_from(schedule_names()), stage_ios(5, 3), st.integers(1, 4))


def some_place(data: st.DataObject, lists: Lists) -> tuple[int, int]:
    rank = data.draw(st.sampled_from([r for r, program in enumerate(lists) if program]))
    return rank, data.draw(st.integers(0, len(lists[rank]) - 1))


@settings(max_examples=examples(100, 400), deadline=None)
@given(plan=SMALL, data=st.data())
def test_a_dropped_instruction_is_found(
    plan: tuple[str, StageIO, int], data: st.DataObject
) -> None:
    lists = compile_schedule(*plan)
    rank, at = some_place(data, lists)
    del lists[rank][at]
    with pytest.raises(ScheduleError):
        check_lists(lists, *plan[1:])


@settings(max_examples=examples(100, 400), deadline=None)
@given(plan=SMALL, data=st.data())
def test_a_doubled_instruction_is_found(
    plan: tuple[str, StageIO, int], data: st.DataObject
) -> None:
    lists = compile_schedule(*plan)
    rank, at = some_place(data, lists)
    to = data.draw(st.integers(0, len(lists[rank])))
    lists[rank].insert(to, lists[rank][at])
    with pytest.raises(ScheduleError):
        check_lists(lists, *plan[1:])


@settings(max_examples=examples(75, 600), deadline=None)
@given(plan=SMALL, data=st.data(), near=st.booleans())
def test_swapped_instructions_are_found_or_harmless(
    plan: tuple[str, StageIO, int], data: st.DataObject, near: bool
) -> None:
    """Harmless: executed with symbols, everything still comes out as in one process."""
    lists = compile_schedule(*plan)
    rank, at = some_place(data, lists)
    last = len(lists[rank]) - 1
    to = min(at + 1, last) if near else data.draw(st.integers(0, last))
    program = lists[rank]
    program[at], program[to] = program[to], program[at]
    found_or_harmless(lists, *plan[1:])


@settings(max_examples=examples(75, 600), deadline=None)
@given(plan=SMALL, data=st.data(), name=st.sampled_from(["stage", "microbatch", "peer", "value"]))
def test_an_edited_instruction_is_found_or_harmless(
    plan: tuple[str, StageIO, int], data: st.DataObject, name: str
) -> None:
    _, io, microbatches = plan
    lists = compile_schedule(*plan)
    rank, at = some_place(data, lists)
    ins = lists[rank][at]
    names = [e.name for e in io.edges]
    values = st.sampled_from([None, *names, *(f"grad:{n}" for n in names)])
    numbers = st.none() | st.integers(0, max(io.n_stages, microbatches))
    new = data.draw(values if name == "value" else numbers)
    if new == getattr(ins, name):
        return
    lists[rank][at] = dataclasses.replace(ins, **{name: new})  # type: ignore[arg-type]
    found_or_harmless(lists, io, microbatches)


def found_or_harmless(lists: Lists, io: StageIO, microbatches: int) -> None:
    try:
        check_lists(lists, io, microbatches)
    except ScheduleError:
        return
    assert replay(lists, io, microbatches) == reference(io, microbatches)


@settings(max_examples=examples(75, 300), deadline=None)
@given(plan=SMALL, data=st.data())
def test_swapping_microbatches_of_a_kind_is_found(
    plan: tuple[str, StageIO, int], data: st.DataObject
) -> None:
    """A transfer, FREE or forward that changes places with its like of another microbatch."""
    _, io, microbatches = plan
    lists = compile_schedule(*plan)
    pairs = []
    for rank, program in enumerate(lists):
        places: dict[tuple[object, ...], list[int]] = {}
        for at, ins in enumerate(program):
            backward = ins.kind in COMPUTE and ins.kind.value != "F"
            if ins.microbatch is not None and not backward:
                places.setdefault((ins.kind, ins.stage, ins.value, ins.peer), []).append(at)
        # Without compute of the later microbatch in between, the order may be free.
        for spots in places.values():
            pairs += [
                (rank, a, b) for a in spots for b in spots if a < b and between(program, a, b)
            ]
    if not pairs:
        return
    rank, a, b = data.draw(st.sampled_from(pairs))
    lists[rank][a], lists[rank][b] = lists[rank][b], lists[rank][a]
    with pytest.raises(ScheduleError):
        check_lists(lists, io, microbatches)


def between(program: list[Instruction], a: int, b: int) -> bool:
    """Whether the microbatch of `program[b]` is computed between the two places."""
    return any(
        ins.kind in COMPUTE and ins.microbatch == program[b].microbatch for ins in program[a:b]
    )


def test_waiting_for_each_other_shows_the_grid() -> None:
    io = StageIO(
        3,
        (0, 1, 0),
        (Edge("x", 0, (1,), True, 4), Edge("y", 1, (2,), True, 4)),
        (True,) * 3,
    )
    lists = compile_schedule("1f1b", io, 1)
    words = [str(ins) for ins in lists[0]]
    program = lists[0]
    first = program.pop(words.index("0F0"))
    program.insert(words.index("2B0"), first)  # behind the receive that depends on it
    with pytest.raises(ScheduleError) as caught:
        check_lists(lists, io, 1)
    text = str(caught.value)
    assert "not here" in text
    assert ">>0SF0[x>1]<<" in text

    lists = compile_schedule("1f1b", io, 1)
    sends = [str(ins) for ins in lists[0]].index("0SF0[x>1]")
    moved = lists[0].pop(sends)
    receives = [str(ins) for ins in lists[0]].index("2RF0[y<1]")
    lists[0].insert(receives + 1, moved)
    drop = [str(ins) for ins in lists[0]].index("0DEL0[x]")
    free = lists[0].pop(drop)
    lists[0].insert(receives + 1, free)
    with pytest.raises(ScheduleError) as caught:
        check_lists(lists, io, 1)
    text = str(caught.value)
    assert "rank group 0 waits at 2RF0[y<1] for rank group 1 (stage 1), which stands at" in text
    assert "rank group 1 waits at 1RF0[x<0] for rank group 0 (stage 0), which stands at" in text
    assert ">>2RF0[y<1]<<" in text
    assert ">>1RF0[x<0]<<" in text


def test_a_message_that_nobody_sends() -> None:
    lists = compile_schedule("gpipe", chain_io(2, 2), 2)
    words = [str(ins) for ins in lists[1]]
    del lists[1][words.index("1SB1[x0>0]")]
    del lists[1][[str(ins) for ins in lists[1]].index("1DEL1[grad:x0]")]
    with pytest.raises(
        ScheduleError, match=r"rank group 0 waits at 0RB1.*which has finished without sending it"
    ):
        check_lists(lists, chain_io(2, 2), 2)


def test_buffers_see_microbatches_in_order() -> None:
    lists = parse_lists("0: GLOBALS 0F1 0B1 0F0 0B0 0SYNC NORM OPTIMIZER\n")
    with pytest.raises(ScheduleError, match="next forward is microbatch 0"):
        check_lists(lists, StageIO(1, (0,), (), (True,)), 2)


def test_an_incomplete_gradient_names_the_missing_stage() -> None:
    io = StageIO(3, (0, 1, 1), (Edge("x", 0, (1, 2), True, 4),), (True,) * 3)
    lists = compile_schedule("1f1b", io, 1)
    words = [str(ins) for ins in lists[1]]
    assert words[1:-4] == [
        "1RF0[x<0]", "1F0", "2F0", "2DEL0[x]", "2B0", "1B0", "1SB0[x>0]", "1DEL0[grad:x]"
    ]  # fmt: skip
    at = words.index("1B0")
    lists[1][at], lists[1][at + 1] = lists[1][at + 1], lists[1][at]
    with pytest.raises(ScheduleError, match=r"lacks the part of stages \[1\]"):
        check_lists(lists, io, 1)


def test_peaks_count_bytes() -> None:
    io = chain_io(3, 3, nbytes=10)
    report = check_lists(compile_schedule("1f1b", io, 6), io, 6)
    assert report.peak_in_flight == (3, 2, 1)
    assert report.peak_saved_bytes((100, 1000, 10000)) == (300, 2000, 10000)
    # Stage 1 holds its input and its output when forward ends; the others have just one of them.
    assert report.peak_edge_bytes == (10, 20, 10)
    assert report.peak_bytes((100, 1000, 10000)) == (310, 2020, 10010)
    with pytest.raises(ScheduleError, match="2 entries for 3 stages"):
        report.peak_saved_bytes((1, 2))


def test_the_peak_of_a_rank_group_is_not_the_sum_of_its_stages_peaks() -> None:
    io = chain_io(4, 2)
    report = check_lists(compile_schedule("interleaved_1f1b", io, 8), io, 8)
    for rank, together in enumerate(report.peak_saved_bytes((1,) * 4)):
        alone = sum(report.peak_in_flight[s] for s in range(4) if io.rank_of[s] == rank)
        assert together <= alone
    assert report.peak_saved_bytes((1,) * 4) == (5, 3)


@settings(max_examples=examples(25, 100), deadline=None)
@given(io=stage_ios(), microbatches=st.integers(1, 12))
def test_zero_bubble_h1_holds_what_1f1b_on_whole_rank_groups_would(
    io: StageIO, microbatches: int
) -> None:
    lists = compile_schedule("zero_bubble_h1", io, microbatches)
    report = check_lists(lists, io, microbatches)
    peaks = report.peak_saved_bytes((1,) * io.n_stages)
    for held, peak in zip(report.stages, peaks, strict=True):
        assert peak <= len(held) * min(microbatches, len(report.stages))


def test_long_schedules_show_the_place_only() -> None:
    io = chain_io(8, 8)
    lists = compile_schedule("1f1b", io, 64)
    at = [str(ins) for ins in lists[3]].index("3F40")
    del lists[3][at]
    with pytest.raises(ScheduleError) as caught:
        check_lists(lists, io, 64)
    text = str(caught.value)
    assert len(text) < 4000
    assert ">>3SF40[x3>4]<<" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0: 0F0 0B0 0SYNC NORM OPTIMIZER", "before GLOBALS"),
        ("0: GLOBALS 0F0 0B0 0SYNC NORM", "without NORM and OPTIMIZER"),
        ("0: GLOBALS 0F0 0B0 NORM OPTIMIZER", r"before the GRAD_SYNC of stages \[0\]"),
        ("0: GLOBALS 0F0 0SYNC 0B0 NORM OPTIMIZER", "finished 0 of 1 backwards"),
        ("0: GLOBALS 0F0 0B0 0SYNC OPTIMIZER", "once each"),
        ("0: GLOBALS 0F0 0B1 0SYNC NORM OPTIMIZER", "there are 1 microbatches"),
        ("0: GLOBALS 1F0 0SYNC NORM OPTIMIZER", r"holds stages \(0,\)"),
        ("0: GLOBALS 0F0 0W0 0SYNC NORM OPTIMIZER", "the last done of stage 0, microbatch 0 is"),
        ("0: GLOBALS 0B0 0F0 0SYNC NORM OPTIMIZER", "forward to come"),
        ("0: GLOBALS 0F0 0DEL0[saved] 0SYNC NORM OPTIMIZER", "no value of stage 0"),
        ("0: GLOBALS 0F0 0SF0[x>1] 0B0 0SYNC NORM OPTIMIZER", "there is no edge 'x'"),
        ("0: GLOBALS 0F 0B0 0SYNC NORM OPTIMIZER", "needs a microbatch"),
        ("0: GLOBALS\n1: GLOBALS", "2 instruction lists for 1 rank groups"),
    ],
)
def test_faults_by_name(text: str, why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        check_lists(parse_lists(text), StageIO(1, (0,), (), (True,)), 1)
