"""A simulated step as text, as a trace and in words."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from raypar._plan_text import duration, throughput
from raypar.errors import ConfigError
from raypar.mesh.devices import Link
from raypar.report.gantt import gantt, gantt_rows
from raypar.report.simulation import over_limit, summary
from raypar.report.trace import trace_events, write_trace
from raypar.search.cost.base import StageCost
from raypar.search.simulate import Simulation
from tests.search.test_simulate import simulated


@pytest.fixture
def step() -> Simulation:
    found, *_ = simulated("gpipe", 2, 2)
    return found


def test_a_row_shows_who_does_what_when(step: Simulation) -> None:
    """GPipe, two stages, two microbatches: F = 1, B = 2, nine seconds."""
    first, second = gantt_rows(step, 18)
    assert first.cells == "FFFF" + "." * 6 + "B" * 8
    assert second.cells == ".." + "FFFF" + "B" * 8 + "." * 4
    assert first.idle == pytest.approx(3 / 9)


def test_no_cell_of_the_table_is_cut(step: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"optimizer": 900, "parameters": 800, "saved": 10**9}
    memory = tuple(replace(lane, peak_parts=parts) for lane in step.memory)
    monkeypatch.setitem(vars(step), "memory", memory)  # where it is kept once asked for
    rows = summary(step).splitlines()
    (first,) = (row for row in rows if row.startswith("rank group 0"))
    assert first.endswith("100% saved, 0% optimizer")
    assert "…" not in first


@pytest.mark.parametrize(
    ("rate", "text"), [(3.14159, "3.14"), (39.94, "39.9"), (392.6, "393"), (13040.2, "13,040")]
)
def test_samples_a_second_are_written_out(rate: float, text: str) -> None:
    assert throughput(rate) == f"{text} samples/s"


def test_nothing_has_no_small_unit() -> None:
    assert [duration(0), duration(2e-6), duration(0.5)] == ["0 s", "2 us", "500 ms"]


def test_the_chart_is_as_wide_as_it_may_be(step: Simulation) -> None:
    lines = gantt(step, 70).splitlines()
    assert [len(line) for line in lines[:2]] == [70, 70]
    assert "9000 ms" in lines[2]
    with pytest.raises(ConfigError, match="columns"):
        gantt(step, 20)


def test_a_trace_has_every_span_and_an_arrow_for_every_message(
    step: Simulation, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    write_trace(step, path)
    events = json.loads(path.read_text())["traceEvents"]
    assert events == json.loads(json.dumps(trace_events(step)))
    spans = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert len([e for e in spans if e["cat"] == "forward"]) == 4
    assert sum(e["dur"] for e in spans if e["pid"] == 0) == pytest.approx(step.step_s * 1e6)
    for phase in "stf":
        assert len([e for e in events if e["ph"] == phase]) == len(step.messages()) == 4
    held = [e["args"]["saved"] for e in events if e["ph"] == "C" and e["pid"] == 0]
    assert max(held) == 200
    assert held[-1] == 0


def test_messages_on_one_link_do_not_overlap() -> None:
    found, *_ = simulated("gpipe", 2, 6, across=Link(10, 5.0))
    slices = [e for e in trace_events(found) if e["ph"] == "X" and e["tid"] != 0]
    for pid in (0, 1):
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["pid"] == pid)
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(own))


def test_a_trace_that_cannot_be_written_is_told(step: Simulation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trace"):
        write_trace(step, tmp_path / "missing" / "trace.json")


def test_the_summary_tells_time_memory_and_what_it_rests_on(step: Simulation) -> None:
    text = summary(step)
    assert "step 9 s" in text
    assert "device table" in text
    assert "67% backward" in text
    assert "rank group 1" in text
    assert over_limit(step) == []


def test_a_lane_over_its_limit_is_named_with_what_binds() -> None:
    huge = StageCost(1.0, 2.0, 1.0, 1.0, optimizer_bytes=10**12, saved_bytes=10)
    found, *_ = simulated("1f1b", 2, 2, costs=[huge, StageCost(1.0, 2.0, 1.0, 1.0)])
    (line,) = over_limit(found)
    assert "rank group 0" in line
    assert "optimizer" in line
