"""What the page's drawings say is what the simulation and the record say."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt
from raypar._plan_text import duration
from raypar.report.page import _timeline
from raypar.report.page._memory import memory_charts
from raypar.report.page._record import best_trials, pareto_front, reasons
from raypar.report.page._svg import Scale, element, labels
from raypar.report.page._timeline import gantt_chart, shown_lanes
from raypar.report.page._trials import trial_plots
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.simulate import Simulation, simulate
from tests.report.page_checks import Page

seconds = st.floats(1e-6, 1e4)


def rects(drawing: str) -> list[dict[str, str]]:
    return [a for a in Page(drawing).tags("rect") if "data-g" in a]


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1]) / 100


@pytest.fixture(scope="module")
def played() -> tuple[rp.Plan, Simulation]:
    graph = rp.capture(
        lambda: gpt(layers=3, width=16, heads=2, seq_len=8), next(stdlib_bytes(16, 8))
    )
    cluster = rp.Cluster.local(2)
    config = rp.SearchConfig(stages=4, chunks=2, microbatches=8, schedule="interleaved_1f1b")
    plan = rp.plan(graph, cluster, config)
    return plan, simulate(graph, plan, cluster)


def test_the_gantt_chart_covers_what_lanes_compute(played: tuple[rp.Plan, Simulation]) -> None:
    plan, step = played
    chart = gantt_chart(plan, step)
    assert chart.whole is None
    (panel,) = chart.panels
    found = rects(panel.drawing)
    assert len(found) == sum(s.kind != "wait" for i in range(2) for s in step.spans(i))
    for lane, report in enumerate(step.lanes):
        own = [r for r in found if int(r["y"]) // chart.row_height == lane]
        work = sum(percent(r["width"]) for r in own if r["class"].split()[0] != "k-comm")
        assert work == pytest.approx(report.compute, abs=0.01)
        for left, right in itertools.pairwise(own):
            assert percent(left["x"]) + percent(left["width"]) <= percent(right["x"]) + 5e-4
    # The second chunk of a group has a shade of its own.
    for rect in found:
        name = rect["data-g"].split("|")[0]
        if re.fullmatch(r"\d+[FB]\d+", name):
            assert ("c1" in rect["class"].split()) == (name[0] in "23")


def test_a_long_step_is_folded(
    played: tuple[rp.Plan, Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, step = played
    monkeypatch.setattr(_timeline, "_MOST_SPANS", 40)
    chart = gantt_chart(plan, step)
    assert chart.whole is not None
    assert [p.title for p in chart.panels] == ["beginning", "steady state", "end"]
    drawn = [rects(p.drawing) for p in chart.panels]
    assert 0 < sum(map(len, drawn)) <= 40
    spans = [s for i in range(2) for s in step.spans(i)]
    first = min(spans, key=lambda s: s.start)
    assert first.name in {r["data-g"].split("|")[0] for r in drawn[0]}
    assert "NORM" in {r["data-g"].split("|")[0] for r in drawn[2]}
    # In columns, every moment has one colour.
    columns = Page(chart.whole.drawing).tags("rect")
    widths = [percent(r["width"]) for r in columns if r["class"] != "k-wait"]
    busy = sum(1 - lane.idle for lane in step.lanes)
    assert sum(widths) == pytest.approx(busy, abs=0.2)


def test_lanes_of_many_are_spread_with_both_ends(played: tuple[rp.Plan, Simulation]) -> None:
    _, step = played
    assert shown_lanes(step) == [0, 1]

    class Many:
        lanes = step.lanes[:1] * 500
        peak_bytes = (*(1,) * 321, 10**12, *(1,) * 178)

    found = shown_lanes(Many())  # type: ignore[arg-type]
    assert {0, 321, 499} <= set(found)
    assert len(found) <= 32
    assert max(np.diff(found)) < 30


def test_memory_areas_reach_the_peak(played: tuple[rp.Plan, Simulation]) -> None:
    _, step = played
    charts, left = memory_charts(step)
    assert left == ""
    assert len(charts) == 2
    for chart, memory in zip(charts, step.memory, strict=True):
        (peak,) = Page(chart.drawing).tags("circle")
        paths = Page(chart.drawing).tags("path")
        highest = min(
            int(y) for p in paths for y in re.findall(r"(?:V|^M0 )(\d+)", p["d"].split("H0Z")[0])
        )
        assert highest / 1000 == pytest.approx(percent(peak["cy"]), abs=0.06)
        names = {p["class"] for p in paths}
        assert {"m-parameters", "m-saved", "m-gradients"} <= names
        assert percent(peak["cx"]) == pytest.approx(memory.peak_s / step.step_s, abs=1e-3)


@given(st.lists(seconds, min_size=1, max_size=20), st.booleans())
def test_every_value_has_its_place_on_a_scale(values: list[float], zero: bool) -> None:
    scale = Scale.around(values, zero=zero)
    ordered = sorted(values)
    places = [scale.place(v) for v in ordered]
    assert all(0 <= p <= 1 for p in places)
    assert places == sorted(places)
    for a, b in itertools.pairwise(ordered):
        if b > a * 1.01 and not zero and b / ordered[0] < 5:
            assert scale.place(a) < scale.place(b)
    ticks = scale.ticks()
    assert ticks == sorted(set(ticks))
    assert all(scale.low - 1e-9 <= t <= scale.high * (1 + 1e-9) for t in ticks)
    assert len(ticks) <= 8
    assert str(labels(scale, duration)).count("<span") == len(ticks)


def test_elements_escape_attributes_and_texts() -> None:
    made = element("text", ['<b>&"'], data_t='"><script>', x=1.23456789, class_="a", y=None)
    assert made == (
        '<text data-t="&#34;&gt;&lt;script&gt;" x="1.23457" class="a">&lt;b&gt;&amp;&#34;</text>'
    )


def trials(*rows: tuple[float, int, str]) -> tuple[TrialRecord, ...]:
    return tuple(
        TrialRecord(i, "tpe", {}, state, {"simulated": step}, peak)
        for i, (step, peak, state) in enumerate(rows)
    )


rows = st.lists(
    st.tuples(
        st.floats(0.1, 10).map(lambda x: round(x, 1)),
        st.integers(0, 9),
        st.sampled_from(["kept", "kept", "pruned", "infeasible", "failed"]),
    ),
    min_size=3,
    max_size=30,
)


@given(rows)
def test_the_front_is_what_no_other_trial_beats(found: list[tuple[float, int, str]]) -> None:
    all_of_them = trials(*found)
    front = {(t.best_s, t.peak_bytes) for t in pareto_front(all_of_them)}
    kept = {(s, m) for s, m, state in found if state == "kept" and m > 0}
    beaten = {a for a in kept for b in kept if b != a and b[0] <= a[0] and b[1] <= a[1]}
    assert front == kept - beaten


@given(rows, st.integers(0, 29))
def test_every_trial_is_drawn_once_in_the_plane_or_the_strip(
    found: list[tuple[float, int, str]], winner: int
) -> None:
    all_of_them = trials(*found)
    record = SearchRecord("optuna", "tpe", 0, all_of_them, winner, 1.0, bound_s=0.05)
    plots = trial_plots(record)
    assert plots is not None

    def dots(drawing: Any) -> list[dict[str, str]]:
        return Page(str(drawing)).tags("use")

    plane, strip = dots(plots.pareto.drawing), dots(plots.strip or "")
    assert sorted(int(a["data-i"]) for a in plane + strip) == list(range(len(found)))
    for dot in plane:
        _, peak, state = found[int(dot["data-i"])]
        assert peak > 0
        assert (f"s-{state}" in dot["class"].split()) == (state != "kept")
        others = [o for o in plane if found[int(o["data-i"])][1] < peak]
        assert all(percent(o["cy" if "cy" in o else "y"]) >= percent(dot["y"]) for o in others)
    lines = Page(str(plots.progress.drawing)).tags("line")
    best = [a for a in lines if a["class"] == "best-line"]
    assert bool(best) == any(state == "kept" for *_, state in found)
    assert len([a for a in lines if a["class"] == "bound"]) == 1


def test_the_best_trials_begin_with_the_winner() -> None:
    record = SearchRecord(
        "optuna", "tpe", 0,
        trials((3, 1, "kept"), (1, 1, "failed"), (2, 1, "kept"), (2.5, 1, "kept")), 3, 1.0,
    )  # fmt: skip
    assert [t.number for t in best_trials(record)] == [3, 2, 0]
    assert reasons(record) == [("failed", 1, "no reason is told")]
    few = SearchRecord("alpa", "", 0, trials((1, 1, "kept")), 0, 1.0)
    assert trial_plots(few) is None
