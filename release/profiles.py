"""What profiling one stage is worth: its cost beside a real run, predictions before and after.

    python release/profiles.py [--models gpt,mlp,t5] [--plans 12] [--profiles 8] [--live 3]

Predictions are compared with the measured plans of `release/regret.py` (`results/regret_grid`), the
best that were predicted first. Every model begins with an empty store. Costs are CPU seconds of all
processes, since the machine has other users; `--live 0` leaves real runs out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import ray
import torch

from raypar import Cluster
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.cost.stage_job import StageJob
from raypar.search.interop.contest import in_words
from raypar.search.interop.workbench import Workbench
from raypar.search.measure import ProfiledStage
from raypar.search.profiler import LocalProfiler
from raypar.search.study.judge import Judge
from raypar.search.study.ledger import Ledger
from raypar.search.study.profiles import Profiles
from raypar.train.measure import RayMeasurer
from release._figures import about, write_figures
from release._own_cache import own_cache
from release._plan_grid import DEVICES
from release._replay import Table
from release.ours import raypar_cluster
from release.regret import captured, measurer

RESULTS = Path(__file__).parent / "results" / "profiles.json"
GRID = Path(__file__).parent / "results" / "regret_grid"
RUN_S = 2.0
Figures = dict[str, Any]


class Counted(LocalProfiler):
    """Adds up the CPU seconds of its profiles.

    Attributes:
        spent: Of each, in order.
    """

    def __init__(self) -> None:
        self.spent: list[float] = []

    def profile_stage(self, job: StageJob, kind: Any, device: int) -> ProfiledStage:
        """See `LocalProfiler.profile_stage`."""
        began = time.process_time()
        found = super().profile_stage(job, kind, device)
        self.spent.append(time.process_time() - began)
        return found


@dataclass(frozen=True)
class Errors:
    """How far predictions are off.

    Attributes:
        typical: Median of how many times too long or too short they are.
        worst: The most.
        among: The same as `typical` once what all plans share is taken off: what a choice between
            them suffers from.
    """

    typical: float
    worst: float
    among: float

    @classmethod
    def of(cls, predicted: list[float], measured: list[float]) -> Errors:
        """Compares."""
        logs = [log(p / m) for p, m in zip(predicted, measured, strict=True)]
        middle = statistics.median(logs)
        return cls(
            exp(statistics.median(map(abs, logs))),
            exp(max(map(abs, logs))),
            exp(statistics.median(abs(one - middle) for one in logs)),
        )


def before_and_after(name: str, plans: int, profiles: int, rates: Calibration) -> Figures:
    """Predictions for the best plans of a grid, then with stages of some of them profiled."""
    table = Table(GRID / f"{name}.json")
    config = SearchConfig(planner="optuna", profile=profiles)
    counted = Counted()
    with own_cache():
        judge = Judge(Workbench(captured(name), Cluster.local(DEVICES), config, rates))
        ledger = Ledger(0.002)
        rows = [(judge.play(row.plan), row.measured.step_s) for row in table.rows.values()]
        rows = [pair for pair in rows if pair[0].state == "kept"]
        rows.sort(key=lambda pair: pair[0].predicted_s)
        for outcome, _ in rows[:plans]:
            ledger.add("grid", None, outcome)
        measured = [step_s for _, step_s in rows[:plans]]
        first = [ledger.outcomes[n].predicted_s for n in range(len(measured))]
        looked = Profiles(judge, ledger, counted, config)
        for number in sorted(ledger.outcomes, key=lambda n: first[n]):
            looked.look(number)
        looked.refresh(ledger.outcomes)
        last = [ledger.outcomes[n].predicted_s for n in range(len(measured))]
    return {
        "plans": len(measured),
        "profiled": len(counted.spent),
        "pruned": sum(t.state == "pruned" for t in ledger.trials),
        "before": vars(Errors.of(first, measured)),
        "after": vars(Errors.of(last, measured)),
        "profile_cpu_s": statistics.median(counted.spent),
        "best_measured_of_best_predicted": [
            measured[min(range(len(measured)), key=lambda n: told[n])] / min(measured)
            for told in (first, last)
        ],
    }


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of this process and others so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    others = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        others += int(fields[11]) + int(fields[12])
    return time.process_time() + others / ticks


def live(name: str, count: int, rates: Calibration) -> list[Figures]:
    """CPU seconds of profiling a stage of a plan, and of really running it, processes warm."""
    table = Table(GRID / f"{name}.json")
    plans = [row.plan for row in table.rows.values() if len(row.plan.devices) == DEVICES]
    plans = [*plans[:: max(1, len(plans) // count)]][:count]
    found = []
    with own_cache(), measurer(name) as runs:
        runs.measure(plans[0], seconds=0.1)  # starts the processes, imports what is needed
        pids = [process.at.pid for process in runs._pool._processes.values()]
        for plan in plans:
            found.append(_both(name, plan, runs, pids, rates))
            print(f"  {found[-1]}", flush=True)
    return found


def _both(name: str, plan: Plan, runs: RayMeasurer, pids: list[int], rates: Calibration) -> Figures:
    config = SearchConfig(planner="optuna", profile=1)
    with own_cache():
        judge = Judge(Workbench(captured(name), Cluster.local(DEVICES), config, rates))
        ledger = Ledger(0.002)
        ledger.add("grid", None, judge.play(plan))
        looked = Profiles(judge, ledger, runs, config)
        began = cpu_s(pids)
        looked.look(0)  # learning from it and predicting anew included
        middle = cpu_s(pids)
        runs.measure(plan, seconds=RUN_S)
        end = cpu_s(pids)
    return {"plan": in_words(plan), "profile_cpu_s": middle - began, "run_cpu_s": end - middle}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="gpt,mlp,t5")
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--profiles", type=int, default=8)
    parser.add_argument("--live", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cluster = Cluster.local(DEVICES)
    own = load_calibration(cluster)
    body: Figures = {**about(), "calibration": own.note, "models": {}}
    for name in filter(None, args.models.split(",")):
        figures: Figures = {}
        for rates in {"table": table_calibration(cluster), "calibrated": own}.items():
            figures[rates[0]] = before_and_after(name, args.plans, args.profiles, rates[1])
            print(f"{name}, {rates[0]}: {figures[rates[0]]}", flush=True)
        body["models"][name] = figures
    if args.live:
        with raypar_cluster():
            body["live"] = live("gpt", args.live, own)
        body["share"] = max(one["profile_cpu_s"] / one["run_cpu_s"] for one in body["live"])
        assert not ray.is_initialized()
    write_figures(args.json, body)


if __name__ == "__main__":
    main()
