"""The conformance suite on every registered schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings

from raypar.schedules.base import Placement, Schedule
from raypar.schedules.registry import get_schedule, schedule_names
from raypar.testing.schedules import CHECKS, plans
from tests._tiers import examples


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", schedule_names())
def test_conformance(name: str, check: Callable[[Schedule, int], None]) -> None:
    check(get_schedule(name), examples(12, 100))


@pytest.mark.parametrize("name", schedule_names())
@settings(max_examples=examples(17, 50), deadline=None)
@given(plan=plans)
def test_built_in_schedules_run_every_plan(name: str, plan: tuple) -> None:  # type: ignore[type-arg]
    io, microbatches = plan
    get_schedule(name).check(Placement.of(io.rank_of), microbatches)
