"""`raypar plan --html`."""

from pathlib import Path

from click.testing import CliRunner

from raypar.cli import main
from raypar.plan import Plan
from tests.report.page_checks import checked

SMALL = """
model: {target: "examples.models:gpt", kwargs: {layers: 2, width: 16, heads: 2, seq_len: 8}}
data: {target: "examples.data:stdlib_bytes", global_batch: 8, kwargs: {seq_len: 8}}
mesh: {num_workers: 2}
search: {stages: 2}
train: {steps: 2, microbatches: 2}
"""


def test_plan_writes_a_page_beside_the_plan(tmp_path: Path) -> None:
    config, plan, page = (tmp_path / name for name in ("run.yaml", "plan.json", "plan.html"))
    config.write_text(SMALL)
    done = CliRunner().invoke(main, ["plan", str(config), "-o", str(plan), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert f"wrote {page}" in done.output
    found = checked(page.read_text(encoding="utf-8"))
    assert len(Plan.load(plan).stages) == 2
    assert "examples.models:gpt" in found.text
    assert "2 × devices" in found.text
    assert "a plan made anew by planner uniform" in found.text


def test_a_page_that_cannot_be_written_is_told_before_the_search(tmp_path: Path) -> None:
    config, plan = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text(SMALL)
    page = tmp_path / "no" / "plan.html"
    done = CliRunner().invoke(main, ["plan", str(config), "-o", str(plan), "--html", str(page)])
    assert done.exit_code == 2
    assert "--html" in done.output
    assert not plan.exists()
