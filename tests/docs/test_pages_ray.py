"""Every tutorial does what it says, word for word."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raypar.search.planners import base
from tests.docs._pages import blocks_of, run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_ELSEWHERE = {"cluster_job"}
"""Run in tests/jobs, where there is a head with a job server."""
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)\)")


@pytest.fixture
def reader(ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a reader who has a checkout; what pages define there is forgotten after."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    known = set(sys.modules)
    yield tmp_path
    for name, planner in list(base._PLANNERS.items()):
        if not planner.__module__.startswith("raypar."):
            del base._PLANNERS[name]
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem not in _ELSEWHERE], ids=lambda page: page.stem
)
def test_a_tutorial_runs(page: Path, reader: Path) -> None:
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_tells_of_each_block_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        at = f"{page.name}:{block.line}"
        assert block.note.partition(": ")[0] in ("", "file", "shown", "not run here"), at
        assert (block.kind == "text") == (block.note == "shown"), at
    fences = page.read_text().count("\n```")
    assert fences == 2 * len(blocks_of(page)), "a block is not closed, or has no language"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
