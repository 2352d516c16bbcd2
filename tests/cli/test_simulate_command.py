"""`raypar simulate` as a user meets it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raypar.cli import main

SMALL = """
model: {target: "examples.models:gpt", kwargs: {layers: 2, width: 16, heads: 2, seq_len: 8}}
data: {target: "examples.data:stdlib_bytes", global_batch: 8, kwargs: {seq_len: 8}}
mesh: {num_workers: 2}
search: {planner: uniform, stages: 2}
train: {steps: 2, microbatches: 2}
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path))  # no calibration
    path = tmp_path / "run.yaml"
    path.write_text(SMALL)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, args)])


def test_it_tells_time_memory_and_path(config_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = run(config_file, "--gantt", "--trace", trace)
    assert found.exit_code == 0, found.output
    for text in (
        "step ",
        "samples/s",
        "device table",
        "critical path",
        "rank group 1",
        "F forward",
    ):
        assert text in found.output
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_plan_and_a_cluster_can_be_given(config_file: Path, tmp_path: Path) -> None:
    from raypar.mesh.cluster import Cluster

    cluster, plan = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    Cluster.virtual(1, 2, "H100").save(cluster)
    made = CliRunner().invoke(
        main, ["plan", str(config_file), "-o", str(plan), "--cluster", str(cluster)]
    )
    assert made.exit_code == 0, made.output
    found = run(config_file, "--plan", plan, "--cluster", cluster)
    assert found.exit_code == 0, found.output
    assert "85.9 GB" not in found.output
    assert "overhead" in found.output  # a GPU's driver takes memory of its own


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--plan", "missing.json"], "cannot read plan file"),
        (["--cluster", "missing.yaml"], "cannot read cluster file"),
        (["--cost", "guess"], "cost model 'guess' is unknown; valid are analytic"),
    ],
)
def test_bad_input_is_one_message(config_file: Path, args: list[str], told: str) -> None:
    found = run(config_file, *args)
    assert found.exit_code in (1, 2)
    assert told in found.output.replace("\n", " ")
    assert "Traceback" not in found.output


def test_a_plan_that_does_not_fit_is_told(config_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert CliRunner().invoke(main, ["plan", str(config_file), "-o", str(plan)]).exit_code == 0
    found = run(config_file, "--plan", plan, "--set", "model.kwargs.layers=3")
    assert found.exit_code == 1
    assert "PlanError" in found.output
