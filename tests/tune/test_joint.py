"""Studies of hyper-parameters and plans at once, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

import raypar as rp
from raypar.tune import joint_study


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(8, 6, generator=g)
    return [(x, (x[:, 0] > 0).long())]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def trainer(trial: optuna.Trial) -> rp.Trainer:
        lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
        width = trial.suggest_categorical("width", [4, 8])
        stages = trial.suggest_int("stages", 1, 2)
        return rp.Trainer(
            lambda: nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2)),
            loss_fn=nn.functional.cross_entropy,
            optimizer=lambda p: torch.optim.SGD(p, lr=lr),
            data=batches(),
            steps=8,
            scaling_config=rp.ScalingConfig(num_workers=0),
            search_config=rp.SearchConfig(planner="alpa", stages=stages),
            run_config=rp.RunConfig(storage_path=tmp_path),
        )

    return trainer


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


def test_a_study_over_models_and_plans_finds_the_best_run_of_both(make: Any) -> None:
    found = joint_study(make, trials=6)
    trials = found.study.trials
    assert len({t.params["width"] for t in trials} | {t.params["stages"] for t in trials}) > 2
    assert found.best_value == min(t.value for t in trials if t.value is not None)
    assert len(found.best_plan.stages) == found.best_params["stages"]
    for trial in trials:
        assert trial.user_attrs["plan_stages"] == trial.params["stages"]
        assert trial.user_attrs["steps"] == 8
    title, *rows = found.describe().splitlines()
    assert title.split() == ["trial", "loss", "plan", "planned", "in", "parameters"]
    assert len(rows) == 6
    (best,) = [row.split() for row in rows if row.startswith("*")]
    assert best[1:3] == [str(found.study.best_trial.number), f"{found.best_value:.6g}"]
    assert f"stages={found.best_params['stages']}" in best
    # One question for each model and number of stages, however often it is asked.
    asked = {(t.params["width"], t.params["stages"]) for t in trials}
    plans = list((found.folder / "cache" / "plans").glob("*.json"))
    assert len(plans) == len(asked)


def test_the_time_to_a_loss_ends_runs_that_reach_it(make: Any) -> None:
    fixed = {"lr": 1.0, "width": 8, "stages": 1}
    study_of = optuna.samplers.PartialFixedSampler(fixed, optuna.samplers.RandomSampler(seed=0))
    reached = joint_study(make, trials=1, target=0.68, sampler=study_of)
    facts = reached.study.best_trial.user_attrs
    assert facts["steps"] < 8
    assert reached.best_value == facts["seconds"]
    assert "seconds to loss 0.68" in reached.describe().splitlines()[0]
    missed = joint_study(make, trials=1, target=-1.0, sampler=study_of, name="missed")
    facts = missed.study.best_trial.user_attrs
    assert facts["steps"] == 8
    assert missed.best_value > facts["seconds"] + 1.0


def test_trials_may_be_pruned_and_models_that_fit_nothing_count_as_pruned(make: Any) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    pruned = joint_study(make, trials=2, pruner=pruner)
    assert [t.state.name for t in pruned.study.trials] == ["PRUNED"] * 2

    def hopeless(trial: optuna.Trial) -> rp.Trainer:
        return make(trial).changed(search=rp.SearchConfig(planner="alpa", stages=50))  # type: ignore[no-any-return]

    none = joint_study(hopeless, trials=1, name="none")
    (trial,) = none.study.trials
    assert trial.state.name == "PRUNED"
    assert "PlanError" in trial.user_attrs["why"]


def test_wrong_arguments_are_told(make: Any) -> None:
    with pytest.raises(rp.ConfigError, match=r"metric is 'accuracy'.*'loss'"):
        joint_study(make, trials=1, metric="accuracy")
    with pytest.raises(rp.ConfigError, match="time_budget_s"):
        joint_study(make, time_budget_s=0)
    with pytest.raises(rp.ConfigError, match=r"returned int; it must return a raypar\.Trainer"):
        joint_study(lambda trial: 3, trials=1)  # type: ignore[arg-type,return-value]
