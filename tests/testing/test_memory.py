"""What is predicted to be held for backward is what is held."""

from __future__ import annotations

import pytest

from raypar.errors import ScheduleError
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.registry import schedule_names
from raypar.schedules.saved import peak_saved_per_stage
from raypar.testing.schedules import chain_io
from release import memory

STAGES = 3


@pytest.mark.parametrize(
    ("model", "schedule", "recompute"),
    [
        ("gpt_shared_mask", "1f1b", "none"),
        ("cnn", "1f1b", "selective"),
        ("unet", "zero_bubble_h1", "full"),
        ("mlp", "interleaved_1f1b", "none"),
    ],
)
def test_predicted_and_measured_bytes_agree(model, schedule, recompute):
    line = memory.check(model, schedule, recompute, STAGES)
    print(line.text())
    assert any(line.measured)
    assert line.off <= memory.TOLERANCE


def test_recomputing_more_holds_less():
    peaks = [max(memory.check("mlp", "1f1b", policy, 2).measured)
             for policy in ("none", "selective", "full")]  # fmt: skip
    assert peaks[0] >= peaks[1] > peaks[2]


@pytest.mark.parametrize("schedule", schedule_names())
def test_the_walk_agrees_with_the_lifetime_check_where_backward_is_whole(schedule):
    io = chain_io(4, 2 if schedule.startswith("interleaved") else 4, splits=False)
    lists = compile_schedule(schedule, io, 6)
    saved = (5, 7, 11, 13)
    peaks = peak_saved_per_stage(lists, saved, (0,) * 4)
    in_flight = check_lists(lists, io, 6).peak_in_flight
    assert peaks == tuple(n * size for n, size in zip(in_flight, saved, strict=True))


def test_halves_count_with_their_own_size():
    io = chain_io(2, 2)
    lists = compile_schedule("zero_bubble_h1", io, 8)
    whole = peak_saved_per_stage(lists, (10, 10), (0, 0))
    both = peak_saved_per_stage(lists, (10, 10), (10, 10))
    halves = peak_saved_per_stage(lists, (0, 0), (10, 10))
    assert halves[1] > 0
    assert all(max(w, h) <= b <= w + h for w, h, b in zip(whole, halves, both, strict=True))
    assert both == tuple(10 * n for n in check_lists(lists, io, 8).peak_in_flight)


def test_lengths_have_to_agree():
    with pytest.raises(ScheduleError, match="2 stages"):
        peak_saved_per_stage([], (1, 2), (1,))
