"""What a trial tells Ray Tune of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import raypar as rp
from raypar.train.callbacks import RunFacts

pytest.importorskip("ray.tune", reason="needs the extra raypar[tune]", exc_type=ImportError)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    from raypar.tune import _trials

    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        _trials.tune, "report", lambda line, checkpoint: lines.append({**line, "at": checkpoint})
    )
    return lines


def reports_of(first_step: int, folder: Path, known: dict[str, Any]) -> Any:
    """Those of a run that goes on from `first_step`, once its ranks are up."""
    from raypar.tune._trials import Reports

    graph = rp.capture(lambda: torch.nn.Linear(2, 1), torch.ones(2, 2), lambda y, _: y.sum())
    cluster = rp.Cluster.local(1)
    plan = rp.plan(graph, cluster, rp.SearchConfig(planner="uniform", stages=1))
    made = Reports(2, False, folder, known)
    made.on_start(RunFacts("run", folder, plan, graph, cluster, (), first_step))
    return made


def test_a_trial_without_steps_to_run_tells_what_its_checkpoint_knows_as_its_last(
    told: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Tune would show the results of the trial that the checkpoint is from as its own."""
    reports_of(8, tmp_path, {"loss": 0.5, "name": "text"}).rest()
    assert told == [
        {
            "loss": 0.5, "step": 8, "done": True, "planning_s": 0.0, "plan_cached": False,
            "plan_stages": 1, "plan_replicas": 1, "num_devices": 1, "at": None,
        }
    ]  # fmt: skip


def test_steps_are_told_every_so_often_and_the_rest_at_the_end(
    told: list[dict[str, Any]], tmp_path: Path
) -> None:
    made = reports_of(0, tmp_path, {})
    for step in range(5):
        made.on_step({"step": step, "loss": 1.0 - step / 10, "text": "no number"})
    made.rest()
    assert [(line["step"], line["loss"]) for line in told] == [(2, 0.9), (4, 0.7), (5, 0.6)]
    assert not any("done" in line or "text" in line for line in told)
    told.clear()
    made.rest()
    assert told == []
