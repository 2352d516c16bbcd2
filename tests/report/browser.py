"""A page in a headless browser, where there is one: what it answers to JavaScript."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.report.page_checks import Page

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
_WATCH = """<script>
window.errors = [];
addEventListener("error", (event) => window.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => window.errors.push(event.blockedURI));
</script></head>"""
_ASK = """<script>
addEventListener("load", () => {
  const found = {errors: window.errors, bad: window.bad === 1, tips: {}};
  const tip = document.getElementById("tip");
  const place = (query) => document.querySelector(query).getBoundingClientRect();
  const hover = (name, query) => {
    const box = place(query);
    const at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    document.querySelector(query).dispatchEvent(new PointerEvent("pointermove", at));
    found.tips[name] = tip.hidden ? "" : tip.textContent;
  };
  QUESTIONS
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.loaded = performance.getEntriesByType("resource").map((one) => one.name);
  const out = document.createElement("output");
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script></body>"""


def asked(page: str, questions: str, folder: Path, width: int) -> dict[str, Any]:
    """What a page answers in a window, once nothing of it was wrong or too wide.

    Args:
        page: The HTML.
        questions: JavaScript that adds to `found`; `place(query)` is the box of an element, and
            `hover(name, query)` puts what is told over it into `found.tips`.
        folder: For the page and the browser's profile.
        width: Of the window, in pixels.
    """
    assert BROWSER is not None
    file = folder / "page.html"
    ask = _ASK.replace("QUESTIONS", questions, 1)
    file.write_text(page.replace("</head>", _WATCH, 1).replace("</body>", ask, 1), encoding="utf-8")
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
    assert found["errors"] == []
    assert found["loaded"] == []
    assert not found["bad"]
    assert found["overflow"] <= 0, "the page is wider than its window"
    return found
