"""Plans, results and searches as a notebook shows them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

import raypar as rp
from raypar.plan import Plan
from raypar.report.notebook import result_html
from raypar.search.record import SearchRecord, TrialRecord
from raypar.train.result import Result
from tests.report.page_checks import Page

EVIL = "<script>bad = 1</script>"


def small_plan() -> Plan:
    graph = rp.capture(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4),
        lambda out: out.mean(),
    )  # fmt: skip
    return rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2))


def shown(html: str) -> Page:
    page = Page(html)
    assert page.errors == []
    assert not page.tags("script")
    assert len(html) < 20_000
    return page


def test_a_plan_shows_its_stages() -> None:
    plan = small_plan()
    page = shown(plan._repr_html_())
    assert len(page.tags("tr")) == 3
    assert "2 stages on 2 devices" in page.text
    assert plan.stages[1].first in page.text
    many = dataclasses.replace(
        plan,
        stages=plan.stages * 40,
        schedule=dataclasses.replace(plan.schedule, placement=plan.schedule.placement * 40),
    )
    assert "56 more stages" in shown(many._repr_html_()).text


def test_a_search_shows_its_best_trials_and_escapes_their_words() -> None:
    trials = (
        TrialRecord(0, "tpe", {}, "kept", {"simulated": 2.0}, words=EVIL),
        TrialRecord(1, "seed", {"stages": 2}, "kept", {"simulated": 1.0}, 10**6),
        TrialRecord(2, "tpe", {}, "pruned"),
    )
    record = SearchRecord("optuna", "tpe", 7, trials, 1, 3.5)
    page = shown(record._repr_html_())
    assert "3 trials in 3.5 s: 2 kept, 1 pruned; sampler tpe, seed 7" in page.text
    assert page.text.index("1 (winner)") < page.text.index(EVIL)
    assert "stages=2" in page.text


def test_a_result_shows_its_metrics(tmp_path: Path) -> None:
    metrics = {
        "loss": 2.5, "step_s": 0.25, "samples_per_s": 123456.0, "seconds": 90.0,
        "breakdown": {"compute": 0.75, "bubble": 0.25}, "startup": {"total": 1.0},
    }  # fmt: skip
    page = shown(result_html(Result(metrics, tmp_path, small_plan())))
    for text in ("2.5", "250 ms", "123,456", "90 s", "compute 75%, bubble 25%", str(tmp_path)):
        assert text in page.text, text
    failed = Result({}, tmp_path, small_plan(), error=ValueError(EVIL))
    assert f"ValueError: {EVIL}" in shown(result_html(failed)).text
