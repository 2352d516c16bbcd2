import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt
from raypar._plan_text import duration, size, throughput
from raypar.lowered import lower_plan
from raypar.mesh.cluster import Cluster, Node
from raypar.report.page import plan_page, save_page
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.simulate import Simulation, simulate
from raypar.search.what_if import WhatIf
from tests.report.page_checks import checked

EVIL = "<script>alert(1)<"


def trial(number: int, **options: Any) -> TrialRecord:
    given = {
        "proposer": "tpe",
        "decisions": {"stages": 2},
        "state": "kept",
        "step_s": {"quick": 0.01, "simulated": 0.011 + number * 1e-3},
        "peak_bytes": 10**6 * (10 - number % 7),
        "words": "2 stages × 1 replica × 4 microbatches",
    }
    return TrialRecord(number=number, **(given | options))


def record_of(*trials: TrialRecord, **options: Any) -> SearchRecord:
    given: dict[str, Any] = {"planner": "optuna", "sampler": "tpe", "seed": 7, "seconds": 3.5}
    return SearchRecord(trials=trials, winner=options.pop("winner", 0), **(given | options))


@pytest.fixture(scope="module")
def graph() -> rp.OpGraph:
    return rp.capture(lambda: gpt(layers=3, width=16, heads=2, seq_len=8), next(stdlib_bytes(8, 8)))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return rp.Cluster.local(2)


@pytest.fixture(scope="module")
def plan(graph: rp.OpGraph, cluster: Cluster) -> rp.Plan:
    return rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=4))


@pytest.fixture(scope="module")
def played(graph: rp.OpGraph, cluster: Cluster, plan: rp.Plan) -> Simulation:
    return simulate(graph, plan, cluster)


def test_the_page_tells_the_plan_and_its_figures_with_units(
    graph: rp.OpGraph, cluster: Cluster, plan: rp.Plan, played: Simulation
) -> None:
    text = plan_page(plan, graph, cluster, simulation=played, model="my:gpt")
    page = checked(text)
    assert "my:gpt" in page.text
    assert duration(played.step_s) in page.text
    assert throughput(played.samples_per_s) in page.text
    assert size(max(played.peak_bytes)) in page.text
    assert f"{played.bubble:.1%}" in page.text
    for group, cost in enumerate(played.setting.costs):
        assert f"rank group {group}" in page.text
        assert f"{duration(cost.forward_s)} forward" in page.text
    assert "blocks.0" in page.text
    assert "there is no record of a search" in page.text
    assert "no lower bound is known" in page.text


def test_the_search_is_told(
    graph: rp.OpGraph, cluster: Cluster, plan: rp.Plan, played: Simulation
) -> None:
    record = record_of(
        *(trial(i, proposer="alpa" if i == 3 else "tpe") for i in range(12)),
        trial(12, state="infeasible", step_s={}, peak_bytes=0, reason="needs 20 GB of 14 GB"),
        trial(13, state="infeasible", step_s={}, peak_bytes=0, reason="needs 21 GB of 14 GB"),
        trial(14, state="failed", step_s={}, peak_bytes=0, reason="it broke"),
        winner=3,
        bound_s=0.8 * played.step_s,
        bound_parts={"compute": 0.007, "bubble": 0.001},
        importance={"stages": 0.75, "zero": 0.25},
        notes=("the journal was set aside",),
    )
    text = plan_page(plan, graph, cluster, simulation=played, record=record)
    page = checked(text)
    assert "at most 25.0% from the best possible" in page.text
    assert "of 15 trials by optuna, sampler tpe, seed 7" in page.text
    assert "the journal was set aside" in page.text
    assert "75.0%" in page.text
    # Two reasons that differ in a number are one.
    assert re.search(r"infeasible2needs 20 GB of 14 GB", page.text)
    dots = [a for a in page.tags("use") if "data-i" in a]
    assert {int(a["data-i"]) for a in dots} == set(range(15))
    winners = {a["data-i"] for a in dots if "winner" in a["class"].split()}
    assert winners == {"3"}
    words = json.loads(page.scripts[1])
    assert "needs 20 GB of 14 GB" in words["12"]
    assert "11 ms simulated" in words["0"]
    # The table of the best: the winner first, then by step time, ten in all.
    rows = re.findall(r'<tr class="(?:chosen)?"><td class="number">(\d+)</td>', text)
    assert [int(n) for n in rows] == [3, 0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_what_would_change_is_told(
    graph: rp.OpGraph, cluster: Cluster, plan: rp.Plan, played: Simulation
) -> None:
    rows = (
        WhatIf("2 × devices", "4 devices", 0.02, 0.01, "2 replicas", 0.008, "4 replicas", "alpa"),
        WhatIf("½ × memory", "half of it", 0.02, None, "needs <9 GB>", None, "no plan", "alpa"),
    )
    page = checked(plan_page(plan, graph, cluster, simulation=played, what_if=rows))
    assert "-50.0 %" in page.text
    assert "-60.0 %" in page.text
    assert "needs <9 GB>" in page.text
    assert "a plan made anew by planner alpa" in page.text


def test_names_and_reasons_of_others_are_text() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(EVIL, nn.Linear(4, 4))
            self.add_module("<img src=x onerror=alert(1)>", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.children():
                x = layer(x)
            return x

    graph = rp.capture(Model, torch.randn(8, 4), lambda out: out.square().mean())
    cluster = Cluster((Node.of("CPU", 2, name='"><script>alert(2)</script>'),), "<b>cluster</b>")
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=2))
    evil = "</script><script>alert(3)</script>"
    record = record_of(
        *(trial(i, words=evil, proposer=evil, decisions={evil: evil}) for i in range(3)),
        trial(3, state="failed", step_s={}, reason=evil),
        importance={evil: 1.0},
        stopped=evil,
        notes=(evil,),
    )
    plan = dataclasses.replace(plan, alternatives={evil: 1.0})
    text = plan_page(
        plan, graph, cluster, simulation=simulate(graph, plan, cluster), record=record, model=evil
    )
    page = checked(text)
    assert len(page.tags("script")) == 2
    assert not page.tags("img")
    assert EVIL in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "alert(3)" in json.loads(page.scripts[1])["3"]


def test_stages_that_share_a_group_are_drawn_together(graph: rp.OpGraph, cluster: Cluster) -> None:
    config = rp.SearchConfig(stages=4, chunks=2, microbatches=4, schedule="interleaved_1f1b")
    plan = rp.plan(graph, cluster, config)
    page = checked(plan_page(plan, graph, cluster, simulation=simulate(graph, plan, cluster)))
    assert sum(a.get("class") == "band" for a in page.tags("section")) == 2
    assert sum(a.get("class") == "box" for a in page.tags("div")) == 4
    assert "taking turns (interleaved)" in page.text
    assert "stage 2 chunk 1" in page.text


def test_a_plan_of_many_stages_stays_small() -> None:
    graph = rp.capture(
        lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(64))),
        torch.randn(48, 4),
        lambda out: out.square().mean(),
    )
    cluster = Cluster.virtual(16, 8, "A100")
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=64, replicas=1, microbatches=48))
    lowered = lower_plan(graph, plan)
    played = simulate(graph, plan, cluster, lowered=lowered)
    record = record_of(*(trial(i, words="w" * 80) for i in range(3000)))
    text = plan_page(plan, graph, cluster, simulation=played, record=record, lowered=lowered)
    page = checked(text)
    assert len(text.encode()) < 1_000_000
    assert "48 more rank groups" in page.text
    assert "lanes are shown" in page.text
    for title in ("the whole step", "beginning", "steady state", "end"):
        assert title in page.text
    assert "600 of 3000 trials are drawn" in page.text


def test_a_page_that_cannot_be_written_is_told(tmp_path: Any) -> None:
    with pytest.raises(rp.ConfigError, match="--html: cannot write"):
        save_page("<p></p>", tmp_path / "no" / "page.html")
    save_page("<p>×</p>", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "<p>×</p>"


def test_a_plan_for_another_model_is_refused(cluster: Cluster, plan: rp.Plan) -> None:
    other = rp.capture(lambda: nn.Linear(4, 4), torch.randn(8, 4), lambda out: out.mean())
    mine = rp.plan(other, cluster, rp.SearchConfig(stages=1))
    with pytest.raises(rp.PlanError):
        plan_page(plan, other, cluster, simulation=simulate(other, mine, cluster))
