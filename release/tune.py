"""Do sweeps of Ray Tune share plans, stop at once, find the best, and leave nothing behind?

    python release/tune.py [--json FILE] [--only PART]

Needs the extra ``raypar[tune]``. One Ray of 16 virtual CPUs; trials of two devices each, a
two-stage pipeline, on the trial's own placement group.

`asha`: eight learning rates side by side under ASHA. The first trial searches the plan, the others
wait for it and start with it; their planning seconds are printed. The best learning rate must be
the one that is best when all eight are trained to the end in one process. `optuna`: the same model
with `OptunaSearch` as the sweep's algorithm. `pbt`: a population whose members have different plans
(one device, two, four): the worst take over the weights of the best, with their own
plans and learning rates. After each part no placement group, stage actor or driver may be left.
Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import torch
from ray import tune
from ray.util.placement_group import placement_group_table
from torch import nn

import raypar as rp
from raypar.tune import trainable
from release._figures import write_figures

ROOT = Path(__file__).resolve().parents[1]
RATES = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 3e-2, 0.3, 3.0)
STEPS, EVERY = 24, 4
PARTS = ("asha", "optuna", "pbt")


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    rule = torch.randn(8, 4, generator=g)
    inputs = [torch.randn(32, 8, generator=g) for _ in range(4)]
    return [(x, (x @ rule).argmax(-1)) for x in inputs]


class Trainers:
    """Makes the trainer of a trial."""

    def __init__(self, search: dict[str, Any]) -> None:
        self.search = search

    def __call__(self, config: dict[str, Any]) -> rp.Trainer:
        rate = config["lr"]
        return rp.Trainer(
            model,
            loss_fn=nn.functional.cross_entropy,
            optimizer=lambda p: torch.optim.AdamW(p, lr=rate),
            data=batches(),
            steps=STEPS,
            search_config=rp.SearchConfig(microbatches=2, **self.search),
            scaling_config=rp.ScalingConfig(threads_per_worker=1),
            run_config=rp.RunConfig(storage_path=tempfile.gettempdir(), log_every=0),
        )


def asha(folder: Path) -> dict[str, Any]:
    make = Trainers({"planner": "optuna", "stages": 2, "trials": 8, "budget_s": 30})
    scheduler = tune.schedulers.ASHAScheduler(
        time_attr="step", max_t=STEPS, grace_period=EVERY, reduction_factor=2
    )
    found = sweep(
        "asha", folder, make, {"lr": tune.grid_search(list(RATES))},
        tune.TuneConfig(metric="loss", mode="min", scheduler=scheduler),
    )  # fmt: skip
    alone = {rate: in_process(make({"lr": rate})) for rate in RATES}
    found["best_alone"] = min(RATES, key=lambda rate: alone[rate])
    stopped = [t for t in found["trials"] if t["step"] < STEPS]
    searched = [t for t in found["trials"] if not t["plan_cached"]]
    found["passed"] = {
        "best config found": found["best"]["lr"] == found["best_alone"],
        "one trial searched": len(searched) == 1,
        "some trials were stopped early": bool(stopped),
        "nothing left": not found["left"],
    }
    return found


def optuna_search(folder: Path) -> dict[str, Any]:
    from ray.tune.search.optuna import OptunaSearch

    make = Trainers({"planner": "alpa", "stages": 2})
    found = sweep(
        "optuna", folder, make, {"lr": tune.loguniform(1e-5, 1.0)},
        tune.TuneConfig(
            metric="loss", mode="min", num_samples=6, max_concurrent_trials=3,
            search_alg=OptunaSearch(seed=0),
        ),
    )  # fmt: skip
    worst = max(t["loss"] for t in found["trials"])
    found["passed"] = {
        "better than the worst": found["best"]["loss"] < worst,
        "nothing left": not found["left"],
    }
    return found


def pbt(folder: Path) -> dict[str, Any]:
    make = Trainers({"planner": "uniform"})
    scheduler = tune.schedulers.PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=2, quantile_fraction=0.34,
        hyperparam_mutations={"lr": tune.loguniform(1e-3, 1e-2)}, resample_probability=0.5,
        synch=True,
    )  # fmt: skip
    # Tune copies the donor's configuration too: what stays a trial's own is its devices, and so
    # its plan.
    members = [(2, 3e-3), (1, 1e-7), (4, 1e-3)]
    found = sweep(
        "pbt", folder, make,
        {
            "member": tune.grid_search(list(range(len(members)))),
            "devices": tune.sample_from(lambda config: members[config["member"]][0]),
            "lr": tune.sample_from(lambda config: members[config["member"]][1]),
        },
        tune.TuneConfig(metric="loss", mode="min", scheduler=scheduler),
    )  # fmt: skip
    lost = next(t for t in found["trials"] if t["num_devices"] == 1)
    found["passed"] = {
        "the one that learnt nothing took over": lost["loss"] < 0.9 * lost["first_loss"],
        "every member has a plan of its own": len({t["num_devices"] for t in found["trials"]}) == 3,
        "nothing left": not found["left"],
    }
    return found


def sweep(
    name: str, folder: Path, make: Trainers, space: dict[str, Any], config: tune.TuneConfig
) -> dict[str, Any]:
    began = time.perf_counter()
    made = trainable(
        make, num_workers=lambda config: config.get("devices", 2), report_every=EVERY,
        plan_cache=folder / name / "plans",
    )  # fmt: skip
    results = tune.Tuner(
        made, param_space=space, tune_config=config,
        run_config=tune.RunConfig(storage_path=str(folder), name=name, verbose=0),
    ).fit()  # fmt: skip
    seconds = time.perf_counter() - began
    if results.errors:
        raise RuntimeError(f"{name}: {results.errors}")
    keys = (
        "step", "loss", "num_devices", "planning_s", "plan_cached", "plan_stages", "plan_replicas",
    )  # fmt: skip
    trials = [
        {
            "lr": result.config["lr"],
            "first_loss": float(result.metrics_dataframe["loss"].iloc[0]),
            **{key: result.metrics[key] for key in keys},
        }
        for result in results
    ]
    best = results.get_best_result("loss", "min")
    return {
        "seconds": round(seconds, 1),
        "trials": trials,
        "best": {"lr": best.config["lr"], "loss": best.metrics["loss"]},
        "left": left_behind(),
    }


def left_behind(patience_s: float = 10.0) -> list[str]:
    """Placement groups that are held and actors that live after a sweep."""
    end = time.monotonic() + patience_s
    while True:
        groups = [
            entry["name"] or identity
            for identity, entry in placement_group_table().items()
            if entry["state"] != "REMOVED"
        ]
        actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
        if not groups + actors or time.monotonic() > end:
            return groups + actors
        time.sleep(0.1)


def in_process(trainer: rp.Trainer) -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer.settings
        alone = trainer.changed(
            scaling=rp.ScalingConfig(num_workers=0),
            search=rp.SearchConfig(stages=2, microbatches=settings.search.microbatches),
            run=rp.RunConfig(
                name="alone", storage_path=folder, log_every=0,
                checkpoint_config=rp.CheckpointConfig(at_end=False),
            ),
        )  # fmt: skip
        return float(alone.fit().metrics["loss"])


def show(part: str, found: dict[str, Any]) -> None:
    print(f"\n{part}: {found['seconds']} s, best lr {found['best']['lr']:g}")
    print(f"{'lr':>9} {'devices':>7} {'steps':>5} {'loss':>8} {'planned':>8}  plan")
    for t in found["trials"]:
        how = "from the cache" if t["plan_cached"] else "made"
        print(
            f"{t['lr']:9.2g} {t['num_devices']:7d} {t['step']:5d} {t['loss']:8.4f} "
            f"{t['planning_s']:7.2f}s  {t['plan_stages']} x {t['plan_replicas']}, {how}"
        )
    for what, good in found["passed"].items():
        print(f"  {'ok' if good else 'MISSED'}: {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "asha": asha, "optuna": optuna_search, "pbt": pbt,
    }  # fmt: skip
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as folder,
        tempfile.TemporaryDirectory(prefix="ra-", dir="/tmp") as session,
    ):
        ray.init(
            address="local", num_cpus=16, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", object_store_memory=200 * 2**20, _temp_dir=session,
        )  # fmt: skip
        try:
            for part in [options.only] if options.only else PARTS:
                found[part] = runs[part](Path(folder))
                show(part, found[part])
        finally:
            ray.shutdown()
    passed = all(all(part["passed"].values()) for part in found.values())
    if options.json:
        if options.only and options.json.exists():
            before = json.loads(options.json.read_text())
            found = {**{part: before[part] for part in PARTS if part in before}, **found}
            passed = all(all(part["passed"].values()) for part in found.values())
        about = {"ray": ray.__version__, "torch": torch.__version__, "cores": os.cpu_count()}
        write_figures(options.json, {**about, "passed": passed, **found})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
