"""What stages of one model say of each other, and what they hold while they run."""

from __future__ import annotations

import math

import pytest
import torch

from raypar.search.cost.features import StageWork
from raypar.search.cost.learned import working_factor
from raypar.search.cost.own_model import OwnModel, Programs, Residual
from raypar.search.cost.rows import StageRow, row_from_json, row_to_json
from raypar.search.cost.work import Work
from raypar.search.cost.working import most_held

CPU = torch.device("cpu")


def programs(size: float) -> Programs:
    return ((Work(size, 8 * size), (1, 2, 1, 1)),)


def row(working_bytes: int = 0, counted_bytes: int = 0) -> StageRow:
    return StageRow(
        StageWork(programs(10.0)), "CPU", (1.0, 2.0, 0.0, 0.0, 0.0), at=1.0,
        working_bytes=working_bytes, counted_bytes=counted_bytes,
    )  # fmt: skip


def test_nothing_measured_changes_nothing() -> None:
    assert OwnModel().log_factor(programs(1.0)) == 0.0


def test_a_program_is_what_it_was_measured_at_and_siblings_follow_part_of_the_way() -> None:
    own = OwnModel([Residual(programs(1.0), math.log(1.5))])
    same, sibling = own.log_factor(programs(1.0)), own.log_factor(programs(2.0))
    assert math.log(1.45) < same < math.log(1.5)
    assert 0.5 * same < sibling < same
    more = OwnModel([Residual(programs(n), math.log(1.5)) for n in (1.0, 2.0, 3.0, 4.0)])
    assert sibling < more.log_factor(programs(9.0)) < math.log(1.5)


def test_stages_that_differ_are_told_apart() -> None:
    own = OwnModel([Residual(programs(1.0), 0.2, times=4), Residual(programs(2.0), -0.2, times=4)])
    assert own.log_factor(programs(1.0)) > 0.1 > -0.1 > own.log_factor(programs(2.0))
    assert own.log_factor(programs(3.0)) == pytest.approx(0.0, abs=1e-9)


def test_bytes_of_a_stage_are_kept_and_never_make_a_plan_look_leaner() -> None:
    more = row(working_bytes=300, counted_bytes=200)
    assert row_from_json(row_to_json(more)) == more
    assert "working_bytes" not in row_to_json(row())
    assert row_from_json(row_to_json(row())) == row()
    assert working_factor([row()]) == 1.0
    assert working_factor([row(working_bytes=100, counted_bytes=200)]) == 1.0
    assert 1.0 < working_factor([more]) < working_factor([more, more]) < 1.5
    assert more.merged(row()).working_bytes == 300


def test_what_is_held_at_once_is_counted_and_views_are_not() -> None:
    given = torch.ones(1000)

    def run() -> None:
        first = given + 1.0  # 4000 bytes
        view = first.view(10, 100)
        second = view * 2.0  # 4000 more
        del first, view
        third = second[:5].clone()  # the first is gone: 2000 more
        del second
        third.mul_(3.0)

    assert most_held(run, [given], CPU) == 8000
    assert most_held(lambda: given.view(-1), [given], CPU) == 0
