"""What a trial tells Ray Tune of its run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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


def stack() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def trainer_of(config: dict[str, Any], folder: Path) -> rp.Trainer:
    return rp.Trainer(
        stack,
        loss_fn=lambda y, _: (y**2).sum(),
        optimizer=lambda p: torch.optim.SGD(p, lr=config["lr"]),
        data=[(torch.ones(4, 4), torch.ones(4))],
        steps=config["steps"],
        scaling_config=rp.ScalingConfig(num_workers=config["workers"]),
        search_config=rp.SearchConfig(planner="alpa", stages=config["stages"], microbatches=2),
        run_config=rp.RunConfig(name="donor", storage_path=folder, log_every=0),
    )


def test_a_trial_goes_on_from_the_checkpoint_that_tune_gives_it(
    told: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another trial's: under its own plan and learning rate, in a folder without what was there."""
    from raypar.tune import _trials

    donor = {"lr": 0.01, "steps": 2, "workers": 0, "stages": 2}
    given = trainer_of(donor, tmp_path).fit().checkpoint
    assert given is not None
    trial = SimpleNamespace(get_trial_dir=lambda: str(tmp_path / "trial"), get_trial_id=lambda: "t")
    (tmp_path / "trial" / "raypar").mkdir(parents=True)
    (tmp_path / "trial" / "raypar" / "metrics.jsonl").write_text("what it did before")
    monkeypatch.setattr(_trials.tune, "get_context", lambda: trial)
    monkeypatch.setattr(_trials.tune, "get_checkpoint", lambda: _trials.tune.Checkpoint(given.path))
    # It has one device; its ranks are threads of this process all the same.
    group = SimpleNamespace(bundle_count=2)  # the first one is the trial's own
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: group)
    monkeypatch.setattr("raypar.mesh.bundles.get_current_placement_group", lambda: group)
    fit = rp.Trainer.fit

    def fit_here(asked: rp.Trainer) -> rp.Result:
        assert asked.settings.lent is not None
        assert asked.settings.scaling.num_workers == 1
        return fit(asked.changed(lent=None, scaling=rp.ScalingConfig(num_workers=0)))

    monkeypatch.setattr(rp.Trainer, "fit", fit_here)
    run = _trials.Trial(
        lambda config: trainer_of(config, tmp_path), 1, True, False, True, str(tmp_path / "plans")
    )
    own = {"lr": 0.003, "steps": 4, "workers": "auto", "stages": 1}
    run(own)
    assert [(line["step"], line["lr"], line["plan_stages"]) for line in told] == [
        (3, 0.003, 1),
        (4, 0.003, 1),
    ]
    assert all(line["at"] is not None for line in told)
    lines = (tmp_path / "trial" / "raypar" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    # The next trial that asks for such a plan finds it.
    run(own)
    assert [line["plan_cached"] for line in told] == [False, False, True, True]
