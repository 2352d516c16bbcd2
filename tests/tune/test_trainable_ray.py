"""Trials of Ray Tune: on their own groups, resumed, cloned across plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table
from torch import nn

import raypar as rp
from raypar.tune import trainable

tune = pytest.importorskip("ray.tune", reason="needs the extra raypar[tune]", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 6, generator=g, dtype=torch.float64), torch.arange(8) % 3)]


class Looks(rp.Callback):
    """Writes down what a trial sees of the cluster once its ranks are up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_start(self, run: Any) -> None:
        held = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
        found = {
            "groups": len(held),
            "bundles": [len(g["bundles"]) for g in held],
            "meshes": len({stage.mesh.devices for stage in run.plan.stages}),
            "first_step": run.first_step,
        }
        name = f"{ray.get_runtime_context().get_actor_id()}-{run.first_step}.json"
        (self.folder / name).write_text(json.dumps(found))


class Told(tune.Callback):
    """Keeps what trials report, in the order in which it arrives.

    The files that Tune writes beside are no record of it: a trial that is restored may get an older
    copy of them back.
    """

    def __init__(self) -> None:
        self.by_devices: dict[int, list[dict[str, Any]]] = {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.by_devices.setdefault(result["num_devices"], []).append(result)


def trainer(config: dict[str, Any], looks: Path, scaling: Any = None) -> rp.Trainer:
    return rp.Trainer(
        model,
        loss_fn=nn.functional.cross_entropy,
        optimizer=lambda p: torch.optim.AdamW(p, lr=config["lr"]),
        data=batches(),
        steps=4,
        scaling_config=scaling or rp.ScalingConfig(threads_per_worker=1),
        search_config=rp.SearchConfig(
            planner="alpa" if "stages" in config else "uniform",
            stages=config.get("stages", "auto"),
            microbatches=2,
        ),
        run_config=rp.RunConfig(
            name="alone", storage_path=looks, log_every=0, callbacks=[Looks(looks)]
        ),
    )


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    folder = tmp_path / "looks"
    folder.mkdir()
    yield folder
    assert not [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


def alone(looks: Path, config: dict[str, Any]) -> rp.Result:
    return trainer(config, looks / "in-process", rp.ScalingConfig(num_workers=0)).changed(
        run=rp.RunConfig(name="alone", storage_path=looks / "in-process", log_every=0)
    ).fit()  # fmt: skip


@pytest.mark.parametrize(
    "rates", [[0.01], pytest.param([0.01, 0.02], marks=pytest.mark.thorough)], ids=len
)
def test_trials_of_two_meshes_run_on_their_own_groups_and_share_a_plan(
    ray_session: str, looks: Path, rates: list[float]
) -> None:
    made = trainable(lambda config: trainer(config, looks), num_workers=2, report_every=2)
    results = tune.Tuner(
        made,
        param_space={"lr": tune.grid_search(rates), "stages": 2},
        run_config=tune.RunConfig(storage_path=str(looks), name="sweep", verbose=0),
    ).fit()
    assert not results.errors
    assert [r.metrics["step"] for r in results] == [4 for _ in rates]
    assert sorted(r.metrics["plan_cached"] for r in results) == [False, True][: len(rates)]
    for result in results:
        expected = alone(looks, result.config)
        assert abs(result.metrics["loss"] - expected.metrics["loss"]) < 1e-9
        assert expected.checkpoint is not None
        weights = rp.Checkpoint(result.checkpoint.path).state_dict()
        torch.testing.assert_close(weights, expected.checkpoint.state_dict())
    seen = [json.loads(path.read_text()) for path in looks.glob("*.json")]
    assert len(seen) == len(rates)
    for found in seen:
        assert found["meshes"] == 2
        assert found["groups"] <= len(rates)  # one for each trial, none beside
        assert set(found["bundles"]) == {2}


@pytest.mark.thorough
def test_population_based_training_moves_checkpoints_between_plans(
    ray_session: str, looks: Path
) -> None:
    made = trainable(
        lambda config: trainer(config, looks).changed(steps=3),
        # Tune copies the donor's configuration too: what stays a trial's own is its devices.
        num_workers=lambda config: config["devices"],
        report_every=1,
    )
    # One exchange, after two of three steps: each starts both trials and all their ranks anew.
    population = tune.schedulers.PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=2, quantile_fraction=0.5,
        resample_probability=0.0, hyperparam_mutations={"lr": tune.uniform(1e-12, 1.0)},
        custom_explore_fn=lambda config: {**config, "lr": 0.003}, synch=True,
    )  # fmt: skip
    told = Told()
    results = tune.Tuner(
        made,
        param_space={
            # The second one learns nothing, until it takes over the first one's weights.
            "which": tune.grid_search([0, 1]),
            "lr": tune.sample_from(lambda config: (0.03, 1e-9)[config["which"]]),
            "devices": tune.sample_from(lambda config: (2, 1)[config["which"]]),
        },
        tune_config=tune.TuneConfig(scheduler=population, metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(looks), name="pbt", verbose=0, callbacks=[told]),
    ).fit()
    assert not results.errors
    assert {r.metrics["num_devices"] for r in results} == set(told.by_devices) == {1, 2}
    [cloned] = [r.metrics for r in results if r.metrics["num_devices"] == 1]
    assert cloned["step"] == 3
    lines = told.by_devices[1]
    assert cloned["loss"] < 0.98 * lines[0]["loss"]
    rates = {line["lr"] for line in lines if "lr" in line}
    assert rates == {1e-9, 0.003}  # its own learning rate, not the one in the checkpoint
    first = [json.loads(path.read_text())["first_step"] for path in looks.glob("*.json")]
    assert max(first) > 0
