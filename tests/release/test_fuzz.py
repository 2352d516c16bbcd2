"""A slice of the fuzz, and that it would see a find and goes on where it stopped."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from raypar.errors import PlanError
from release import fuzz
from release._fuzz_targets import TARGETS, Tally, Target


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_end_in_clear_errors(name: str) -> None:
    tally = Tally()
    fuzz.fuzz_round(TARGETS[name], 0, 80, tally)
    assert tally.inputs == tally.accepted + tally.refused == 80
    assert tally.refused > 10


@pytest.mark.parametrize("target", ["plan", "config", "checkpoint", "cluster", "messages"])
def test_the_inputs_are_near_enough_to_be_accepted_at_times(target: str) -> None:
    tally = Tally()
    fuzz.fuzz_round(TARGETS[target], 1, 150, tally)
    assert tally.accepted > 0


def _reader(find: int | None) -> Target:
    def accepts(value: Any) -> bool:
        if find is not None and value >= find:
            raise ZeroDivisionError("a find")
        if value % 2:
            raise PlanError("odd")
        return True

    return Target(lambda: st.integers(0, 10_000), accepts)


def test_a_find_is_shrunk_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "TARGETS", {"numbers": _reader(1234)})
    monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", "600"])
    assert fuzz.main() == 1
    said = capsys.readouterr().err
    assert "given_input=1234" in said
    assert "found something in round 0" in said
    # Warnings of raypar are heard again by whoever called it.
    assert logging.getLogger("raypar").level == logging.NOTSET


def test_it_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = tmp_path / "fuzz.json"
    rounds: list[tuple[int, int]] = []

    def one_round(target: Target, number: int, count: int, tally: Tally) -> None:
        rounds.append((number, count))
        tally.inputs += count

    monkeypatch.setattr(fuzz, "TARGETS", {"numbers": _reader(None)})
    monkeypatch.setattr(fuzz, "fuzz_round", one_round)
    for inputs in ("1000", "1700"):
        monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", inputs, "--state", str(state)])
        assert fuzz.main() == 0
    assert rounds == [(0, 500), (1, 500), (2, 500), (3, 200)]
    assert json.loads(state.read_text())["numbers"]["inputs"] == 1700
