"""The notebook runs from its first cell to its last, and its outputs are kept with it."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def cells() -> list[dict[str, Any]]:
    found = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (found["nbformat"], found["metadata"]["language_info"]["name"]) == (4, "python")
    return [cell for cell in found["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any], number: int) -> Any:
    """Runs a cell as a notebook does; the value of its last line, if that is an expression."""
    tree, shown = ast.parse(source), None
    if isinstance(tree.body[-1], ast.Expr):
        shown = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    exec(compile(tree, f"cell {number}", "exec"), names)
    return None if shown is None else eval(compile(shown, f"cell {number}", "eval"), names)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_runs(
    ray_session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    names: dict[str, Any] = {"__name__": "__main__"}
    html = 0
    for number, cell in enumerate(cells()):
        value = run_cell("".join(cell["source"]), names, number)
        if hasattr(value, "_repr_html_"):
            html += "</" in value._repr_html_()
    assert html == 2, "the plan and the result show themselves"
    here, there = names["result"], names["on_ray"]
    assert here.metrics["loss"] == pytest.approx(there.metrics["loss"], rel=1e-6)
    assert here.metrics["loss"] < 4


def test_the_outputs_are_kept_and_hold_no_error() -> None:
    kinds = [output["output_type"] for cell in cells() for output in cell["outputs"]]
    assert "execute_result" in kinds
    assert "error" not in kinds
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    text = json.dumps(cells())
    assert "text/html" in text
    assert "/root/" not in text, "a path of somebody's machine"
