"""The page in a browser, where there is one: it draws, tells on hover, zooms, loads nothing."""

from pathlib import Path

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.report.page import plan_page
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.simulate import simulate
from tests.report.browser import asked, needs_browser

EVIL = "</script><script>bad = 1</script>"
QUESTIONS = """
  hover("span", ".gantt [data-g*='F0']");
  hover("trial", "use[data-i='1']");
  hover("memory", "path.m-parameters");
  hover("none", "h1");
  found.span = place(".gantt [data-g*='F0']").width;
  found.before = place(".zoomed").width;
  document.querySelector("[data-zoom='2']").click();
  found.after = place(".zoomed").width;
"""


@pytest.fixture(scope="module")
def page() -> str:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(EVIL, nn.Linear(8, 8))
            self.add_module("head", nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.children():
                x = layer(x)
            return x

    graph = rp.capture(Model, torch.randn(8, 8), lambda out: out.square().mean())
    cluster = rp.Cluster.local(2)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=4))
    trials = tuple(
        TrialRecord(i, "tpe", {}, "kept", {"simulated": 1.0 + i}, 10**6, words=EVIL)
        for i in range(4)
    )
    record = SearchRecord("optuna", "tpe", 0, trials, 0, 1.0)
    played = simulate(graph, plan, cluster)
    return plan_page(plan, graph, cluster, simulation=played, record=record)


@needs_browser
@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_works_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    found = asked(page, QUESTIONS, tmp_path, width)
    assert found["tips"]["span"].startswith("forward, stage 0, microbatch 0\nat ")
    assert found["span"] > 0
    assert EVIL in found["tips"]["trial"]
    assert "trial 1 by tpe: kept" in found["tips"]["trial"]
    assert found["tips"]["memory"].startswith("parameters: ")
    assert found["tips"]["none"] == ""
    assert found["after"] == pytest.approx(2 * found["before"], rel=0.01)
