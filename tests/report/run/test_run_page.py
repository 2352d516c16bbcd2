"""The page of a run: what it draws, what is missing or damaged, and how it works in a browser."""

from __future__ import annotations

import contextlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raypar.errors import ConfigError
from raypar.report.run import run_page, write_report, write_run_trace
from raypar.report.run.files import read_run
from raypar.report.run.measured import all_spans, measured_step
from raypar.report.run.predicted import Prediction
from raypar.train.breakdown import meetings_of
from tests._tiers import examples
from tests.report.browser import asked, needs_browser
from tests.report.page_checks import checked
from tests.report.run.runs import make_run

FILES = ("plan.json", "metrics.jsonl", "result.json", "timeline.json", "predicted.json",
         "events.jsonl")  # fmt: skip
EVIL = "</script><script>bad = 1</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", name=EVIL)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_leaves_all_that_its_page_draws(run: Path, tmp_path: Path) -> None:
    assert {path.name for path in run.iterdir()} == set(FILES)
    write_report(run, tmp_path / "page.html")
    page = checked((tmp_path / "page.html").read_text(encoding="utf-8"))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"loss", "parts", "gantt-predicted", "gantt-measured", "memory-predicted",
            "memory-measured", "links", "plan", "events"} <= ids  # fmt: skip
    assert EVIL in page.text
    assert "evaluation" in page.text
    assert "checkpoints/00000006" in page.text
    assert page.text.index("predicted:") < page.text.index("measured: step")
    assert (tmp_path / "page.html").stat().st_size < 500_000


def test_the_measured_step_is_what_ranks_told(run: Path) -> None:
    timeline = read_run(run).timeline
    assert timeline is not None
    found = measured_step(timeline)
    lines = {line["step"]: line for line in read_run(run).steps}
    assert found.step in timeline.steps[1:-1]
    for at, lane in enumerate(found.lanes):
        spans = found.spans(at)
        assert all(span.end > span.start for span in spans)
        assert spans[0].start >= 0
        assert spans[-1].end <= found.step_s * (1 + 1e-9)
        gaps = [b.start - a.end for a, b in pairwise(spans)]
        assert max(map(abs, gaps)) < 1e-6, "every moment is spoken for"
        # By name: a rank may begin the next step while the last one still ends this one.
        assert len({span.name for span in spans if span.kind == "F"}) == 4
        assert 0.99 < lane.compute + lane.communication + lane.idle < 1.01
        took = sum(s.end - s.start for s in spans if s.kind in ("F", "B"))
        assert took <= found.step_s
        # Over all steps: of a forward that began before the shown one ends, only the rest is shown.
        rank = found.ranks[at]
        computed = [lines[n]["ranks"][rank]["seconds"]["compute"] for n in timeline.steps]
        whole = all_spans(timeline, rank, meetings_of(timeline.lists))
        took = sum(s.end - s.start for s in whole if s.kind in ("F", "B"))
        assert 0 < sum(computed) <= took + 1e-5 * len(computed)
    first = read_run(run).steps[0]["memory"]
    assert found.peak_bytes == tuple(first[str(stage)]["peak"] for stage in (0, 1))


def test_replicas_have_a_row_each(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "two", replicas=2, steps=3, microbatches=2)
    timeline = read_run(folder).timeline
    assert timeline is not None
    assert [(lane.group, lane.replica) for lane in measured_step(timeline).lanes] == [
        (0, 0), (0, 1), (1, 0), (1, 1)
    ]  # fmt: skip
    page = checked(run_page(folder))
    assert "group 1 r1" in page.text


@pytest.mark.parametrize("seed", [3, 11, 17])
def test_any_plan_is_taken_apart_and_drawn(tmp_path: Path, seed: int) -> None:
    folder = make_run(tmp_path / "any", seed=seed, steps=3)
    run = read_run(folder)
    for line in run.steps:
        assert min(line["breakdown"].values()) >= 0
        assert sum(line["breakdown"].values()) == pytest.approx(line["step_s"], abs=1e-5)
    assert run.timeline is not None
    found = measured_step(run.timeline)
    for lane in range(len(found.lanes)):
        spans = found.spans(lane)
        assert sum(s.end - s.start for s in spans) == pytest.approx(found.step_s, rel=1e-6)
    checked(run_page(folder))
    write_run_trace(folder, tmp_path / "trace.json")


def test_a_prediction_round_trips(run: Path) -> None:
    text = (run / "predicted.json").read_text()
    found = Prediction.from_json(text)
    again = Prediction.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.spans(0) == found.spans(0)
    assert np.array_equal(again.memory[0].moving, found.memory[0].moving)
    assert sum(moved.nbytes for moved in found.moved) > 0


@pytest.mark.parametrize("name", FILES)
def test_the_page_goes_without_a_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    page = checked(run_page(copy))
    words = {"plan.json": "no plan.json", "metrics.jsonl": "no metrics.jsonl",
             "result.json": "killed", "timeline.json": "no measured step",
             "predicted.json": "nothing is predicted", "events.jsonl": "No events"}  # fmt: skip
    assert words[name] in page.text


def test_a_run_that_ended_at_once_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"error": f"ConfigError: {EVIL}"}))
    page = checked(run_page(tmp_path))
    assert f"ConfigError: {EVIL}" in page.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds none of"):
        run_page(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is no folder"):
        run_page(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report(tmp_path, tmp_path / "none" / "page.html")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["{", '{"format": 3}\n[]\n', "[[1, 2]]\n{}\n", "\xff\xfe"])
def test_a_damaged_file_is_named(copy: Path, name: str, text: str) -> None:
    if name.endswith("jsonl") and text == "{":
        text = "{\n{}\n"  # a last line that was cut off is no damage
    if name == "result.json" and text.startswith('{"format"'):
        text = "3"
    (copy / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=name):
        run_page(copy)


@given(data=st.data())
@settings(
    max_examples=examples(20, 60), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
def test_changed_predictions_are_refused_or_understood(run: Path, data: st.DataObject) -> None:
    raw = json.loads((run / "predicted.json").read_text())
    at: Any = raw
    while isinstance(at, (dict, list)) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            at[key] = data.draw(st.none() | st.text(max_size=3) | st.floats() | st.just([]))
            break
        at = at[key]
    with contextlib.suppress(ConfigError):
        Prediction.from_json(json.dumps(raw))


def test_the_trace_has_an_arrow_for_every_message(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    write_run_trace(run, out)
    events = json.loads(out.read_text())["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == 6 * 2 * 4, "steps × directions × microbatches"
    for number, start in starts.items():
        assert start["pid"] != ends[number]["pid"]
        assert start["ts"] <= ends[number]["ts"]
        inside = [
            e for e in events if e["ph"] == "X" and e["pid"] == ends[number]["pid"]
            and e["ts"] <= ends[number]["ts"] <= e["ts"] + e["dur"] + 0.2
        ]  # fmt: skip
        assert inside, "an arrow ends at a slice"
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert any(name.startswith("predicted: ") for name in names)
    assert any(name.startswith("rank 1: stages 1") for name in names)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="no step to trace"):
        write_run_trace(tmp_path / "bare", out)


QUESTIONS = """
  hover("predicted", "#gantt-predicted [data-g*='F0']");
  hover("measured", "#gantt-measured [data-g*='F0']");
  hover("evaluation", "circle.evaluation");
  hover("memory", "#memory-measured path.m-parameters");
  hover("part", "#parts path.k-F");
  found.axes = ["predicted", "measured"].map((id) => place(`#gantt-${id} .zoomed`).width);
  found.line = place("#loss .line").height;
  document.querySelector("[data-zoom='2']").click();
  found.after = ["predicted", "measured"].map((id) => place(`#gantt-${id} .zoomed`).width);
"""


@needs_browser
def test_the_page_works_in_a_browser(run: Path, tmp_path: Path) -> None:
    found = asked(run_page(run), QUESTIONS, tmp_path, 1100)
    for name in ("predicted", "measured"):
        assert found["tips"][name].startswith("forward, stage 0, microbatch 0\nat ")
    assert found["tips"]["evaluation"].startswith("evaluation after step 3: ")
    assert found["tips"]["memory"].startswith("parameters: ")
    assert found["tips"]["part"].startswith("compute: ")
    assert found["axes"][0] == pytest.approx(found["axes"][1], abs=1), "one scale"
    assert found["after"] == pytest.approx([2 * width for width in found["axes"]], rel=0.01)
    assert found["line"] > 20
