"""Bubbles and peaks against the papers' formulas."""

from __future__ import annotations

import pytest

from raypar.errors import ScheduleError
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.instructions import Instruction
from raypar.schedules.text import parse_lists
from raypar.schedules.timing import Durations, Timeline, ideal_timeline, main
from raypar.testing.schedules import chain_io


def play(
    name: str, stages: int, microbatches: int, *, chunks: int = 1, splits: bool = True
) -> tuple[Timeline, int]:
    """Timeline at F = I = W = 1 per rank group, and the most microbatches alive on one."""
    n = stages * chunks
    io = chain_io(n, stages, splits=(splits or s > 0 for s in range(n)))  # type: ignore[arg-type]
    lists = compile_schedule(name, io, microbatches)
    part = 1 / chunks
    times = Durations.uniform(n, part, part, part).fused(io.splits)
    peak = max(check_lists(lists, io, microbatches).peak_saved_bytes((1,) * n))
    return ideal_timeline(lists, times), peak


@pytest.mark.parametrize("stages", range(2, 9))
def test_zero_bubble_h1_halves_the_bubble_at_the_same_peak(stages: int) -> None:
    for microbatches in (2 * stages, 2 * stages + 1, 3 * stages + 2):
        plain, plain_peak = play("1f1b", stages, microbatches)
        for splits in (True, False):  # False: the first stage has no input gradient
            ours, peak = play("zero_bubble_h1", stages, microbatches, splits=splits)
            assert max(ours.bubble) <= max(plain.bubble) / 2
            assert max(ours.bubble) == stages - 1  # (S - 1)(F + I - W), arXiv:2401.10241 table 2
            assert peak <= plain_peak == stages


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_one_stage_per_rank_group(name: str, stages: int) -> None:
    for microbatches in (1, stages, 2 * stages + 1):
        timeline, _ = play(name, stages, microbatches)
        assert timeline.bubble == (3 * (stages - 1),) * stages  # (S - 1)(F + B)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_bubble_by_the_chunks(stages: int, chunks: int) -> None:
    timeline, _ = play("interleaved_1f1b", stages, 2 * stages, chunks=chunks)
    expected = 3 * (stages - 1) / chunks
    assert max(timeline.bubble) == pytest.approx(expected)


def test_interleaved_peaks_follow_the_warm_up() -> None:
    # Device 0 of n with v chunks takes 2(n - 1) + (v - 1)n + 1 forwards in before its first B.
    _, peak = play("interleaved_1f1b", 4, 16, chunks=2)
    assert peak == 2 * 3 + 4 + 1


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaved_zero_bubble_has_a_third_of_the_bubble(stages: int, chunks: int) -> None:
    for microbatches in (2 * stages, 3 * stages):
        ours, peak = play("interleaved_zero_bubble", stages, microbatches, chunks=chunks)
        _, plain_peak = play("interleaved_1f1b", stages, microbatches, chunks=chunks)
        assert max(ours.bubble) == pytest.approx((stages - 1) / chunks)  # (n - 1)(F + I - W) / v
        assert peak == plain_peak


@pytest.mark.parametrize(("stages", "chunks"), [(2, 4), (4, 2), (8, 3)])
def test_long_rounds_hide_transfers_for_more_values_held(stages: int, chunks: int) -> None:
    microbatches = 6 * stages  # four rounds of one and a half times the rank groups
    io = chain_io(stages * chunks, stages)
    times = Durations.uniform(stages * chunks, 1 / chunks, 1 / chunks, 1 / chunks)
    steps, peaks = {}, {}
    for name in ("interleaved_zero_bubble", "interleaved_eager"):
        lists = compile_schedule(name, io, microbatches)
        steps[name] = ideal_timeline(lists, times, transfer=0.5 / chunks).makespan
        peaks[name] = max(check_lists(lists, io, microbatches).peak_saved_bytes((1,) * io.n_stages))
    assert steps["interleaved_eager"] < steps["interleaved_zero_bubble"]
    size = 3 * stages // 2
    assert peaks["interleaved_zero_bubble"] == stages * chunks + stages - 1
    assert peaks["interleaved_eager"] == (chunks - 1) * size + 2 * (stages - 1) + 1


def test_microbatches_that_do_not_fill_the_last_group_cost_less_than_a_group() -> None:
    for stages in (2, 3, 4):
        for microbatches in range(2 * stages, 3 * stages):
            ours, _ = play("interleaved_1f1b", stages, microbatches, chunks=2)
            full, _ = play("interleaved_1f1b", stages, 3 * stages, chunks=2)
            assert ours.makespan < full.makespan


def test_transfers_delay() -> None:
    lists = compile_schedule("1f1b", chain_io(2, 2), 1)
    assert ideal_timeline(lists, Durations.uniform(2), transfer=10).makespan == 2 + 10 + 2 + 10 + 2

    def only_gradients(ins: Instruction) -> float:
        return 5.0 if ins.kind.value == "SB" else 0.0

    assert ideal_timeline(lists, Durations.uniform(2), transfer=only_gradients).makespan == 11


def test_a_deadlock_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"rank group 0 at 0RB0\[x<1\]"):
        ideal_timeline(parse_lists("0: 0RB0[x<1] 0F0\n1: 1F0\n"), Durations.uniform(2))


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--stages", "4", "--microbatches", "8"])
    table = {line[8:37].strip(): line[37:].split() for line in capsys.readouterr().out.split("\n")}
    assert table["1f1b"] == ["33", "9", "1.00", "4"]
    assert table["zero_bubble_h1"] == ["27", "3", "0.33", "4"]
    assert table["interleaved_1f1b ×2"] == ["28.5", "4.5", "0.50", "11"]
    assert table["interleaved_zero_bubble ×2"] == ["25.5", "1.5", "0.17", "11"]
