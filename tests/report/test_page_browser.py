"""The page in a browser, where there is one: it draws, tells on hover, zooms, loads nothing."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.report.page import plan_page
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.simulate import simulate
from tests.report.page_checks import Page

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
EVIL = "</script><script>bad = 1</script>"
ASK = """<script>
addEventListener("load", () => {
  const found = {errors: window.errors, bad: window.bad === 1, tips: {}};
  const tip = document.getElementById("tip");
  const hover = (name, query) => {
    const one = document.querySelector(query), box = one.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    one.dispatchEvent(new PointerEvent("pointermove", at));
    found.tips[name] = tip.hidden ? "" : tip.textContent;
    found[name] = box.width;
  };
  hover("span", ".gantt [data-g*='F0']");
  hover("trial", "use[data-i='1']");
  hover("memory", "path.m-parameters");
  hover("none", "h1");
  const drawing = document.querySelector(".zoomed");
  found.before = drawing.getBoundingClientRect().width;
  document.querySelector("[data-zoom='2']").click();
  found.after = drawing.getBoundingClientRect().width;
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.loaded = performance.getEntriesByType("resource").map((one) => one.name);
  const out = document.createElement("output");
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script></body>"""
WATCH = """<script>
window.errors = [];
addEventListener("error", (event) => window.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => window.errors.push(event.blockedURI));
</script></head>"""


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


def asked(page: str, folder: Path, width: int) -> dict[str, Any]:
    """What the page answers in a window of so many pixels."""
    assert BROWSER is not None
    file = folder / "page.html"
    file.write_text(page.replace("</head>", WATCH, 1).replace("</body>", ASK, 1), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    text = done.stdout
    start = text.index("<output>") + len("<output>")
    answer = Page(f"<p>{text[start : text.index('</output>')]}</p>").text
    found: dict[str, Any] = json.loads(answer)
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_works_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    found = asked(page, tmp_path, width)
    assert found["errors"] == []
    assert found["loaded"] == []
    assert not found["bad"]
    assert found["tips"]["span"].startswith("forward, stage 0, microbatch 0\nat ")
    assert found["span"] > 0
    assert EVIL in found["tips"]["trial"]
    assert "trial 1 by tpe: kept" in found["tips"]["trial"]
    assert found["tips"]["memory"].startswith("parameters: ")
    assert found["tips"]["none"] == ""
    assert found["after"] == pytest.approx(2 * found["before"], rel=0.01)
    assert found["overflow"] <= 0, "the page is wider than its window"
