"""Plans for clusters that are described, not owned: the default search beside all it has to beat.

    python release/virtual.py [--clusters v100_25g,slow_host] [--models GPT-39B,T5-11B]
                              [--played 8] [--again] [--only auto] [--json FILE]

For every cluster of `clusters/*.yaml` and model of `workloads.VIRTUAL`, each captured anew for each
planner: the default search (planner ``auto``), every exact planner that is registered, and the best
plan of the grid that one would make by hand (`_virtual_grid.py`). All plans are played by the same
simulator. Prints seconds of a step, how far the plan is at most from the best possible one (the
plan's certificate), and seconds (wall, and of the processor) from the module to the plan.

On clusters of unequal nodes it plans once more as if all were the slowest: the speed-up over that
is given as a share of Σ speed / (n · slowest speed), speeds being the devices' peak rates for the
model's dtype.

Cases that the JSON file has are not run again; with ``--only`` one planner is, and the other rows
of these cases are kept. Exits with 1 where the default search's plan is slower than another one's,
or took longer than 120 s of the processor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import raypar
from raypar.errors import RayparError
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.planners.base import planner_names
from release._figures import write_figures
from release._virtual_grid import best_by_hand, played
from release.workloads import VIRTUAL, Workload

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "virtual.json"
EXACT = ("alpa", "piper", "placement")
"""Planners that the default search has to beat, as far as they are registered."""
MICROBATCHES = {"wide_resnet": 32}
"""Batch normalisation feels microbatches: their number belongs to the recipe (here Alpa's)."""
LONGEST_S = 120.0


@dataclass(frozen=True)
class Found:
    """What one planner gave.

    Attributes:
        step_s: Simulated seconds of a step; None: no plan.
        words: The plan in one line, or why there is none.
        gap: How much longer it takes at most than the best possible plan, relative to that.
        wall_s: Seconds from the module to the plan.
        cpu_s: Processor seconds of that.
    """

    step_s: float | None
    words: str
    gap: float | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A model on a cluster; seconds are of one simulated step.

    Attributes:
        cluster: Name of the cluster file.
        model: Name of the workload.
        when: Date, processor and load.
        planners: Planner → what it gave; ``auto`` is the default search.
        by_hand: The best plan of the grid.
        ranked: Plans of the grid that fit.
        as_slowest_s: On unequal nodes, the default search's plan if all were the slowest.
        ideal: Σ speed / (n · slowest speed).
    """

    cluster: str
    model: str
    when: str
    planners: dict[str, Found] = field(default_factory=dict)
    by_hand: Found | None = None
    ranked: int = 0
    as_slowest_s: float | None = None
    ideal: float = 1.0

    @property
    def share(self) -> float | None:
        """Speed-up over planning for the slowest, as a share of the ideal one."""
        own = self.planners["auto"].step_s
        if self.as_slowest_s is None or own is None:
            return None
        return self.as_slowest_s / own / self.ideal


def plan_with(workload: Workload, cluster: Cluster, planner: str) -> Found:
    """Captures, plans and plays."""
    began, worked = time.perf_counter(), time.process_time()
    config = SearchConfig(planner=planner, microbatches=MICROBATCHES.get(workload.kind, "auto"))
    try:
        graph = workload.capture()
        plan = raypar.plan(graph, cluster, config)
    except RayparError as error:
        return Found(None, str(error), None, *_since(began, worked))
    took = _since(began, worked)
    step_s, fits = played(graph, plan, cluster, load_calibration(cluster))
    words = in_words(plan) if fits else f"does not fit the memory: {in_words(plan)}"
    return Found(step_s if fits else None, words, plan.certificate.get("gap"), *took)


def _since(began: float, worked: float) -> tuple[float, float]:
    return time.perf_counter() - began, time.process_time() - worked


def by_hand(workload: Workload, cluster: Cluster, most_played: int) -> tuple[Found, int]:
    """The grid's best plan, and how many plans it has."""
    began, worked = time.perf_counter(), time.process_time()
    found = best_by_hand(
        workload.capture(),
        cluster,
        load_calibration(cluster),
        microbatches=MICROBATCHES.get(workload.kind),
        most_played=most_played,
    )
    words = in_words(found.plan) if found.plan else "none fits"
    step_s = found.step_s if found.plan else None
    return Found(step_s, words, None, *_since(began, worked)), found.ranked


def speeds(cluster: Cluster, workload: Workload) -> list[float]:
    """Peak rate of every device for the model's dtype, in FLOP/s."""
    dtype = "float16" if workload.half else "float32"
    return [node.device.peak(dtype) for node in cluster.nodes for _ in range(node.devices)]


def as_slowest(cluster: Cluster, workload: Workload) -> Cluster:
    """The cluster with every node's devices and links those of the slowest node."""
    dtype = "float16" if workload.half else "float32"
    slow = min(cluster.nodes, key=lambda node: node.device.peak(dtype))
    nodes = tuple(replace(slow, name=n.name, devices=n.devices, id=n.id) for n in cluster.nodes)
    return Cluster(nodes, f"{cluster.name}, all as the slowest")


def _when() -> str:
    return (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


def run_case(file: Path, workload: Workload, most_played: int) -> Outcome:
    """One model on one cluster."""
    cluster = Cluster.load(file)
    when = _when()
    names = ["auto", *(name for name in EXACT if name in planner_names())]
    rates = speeds(cluster, workload)
    planners = {name: plan_with(workload, cluster, name) for name in names}
    slow_s, hand, ranked = None, None, 0
    if len(set(rates)) > 1:
        slow_s = plan_with(workload, as_slowest(cluster, workload), "auto").step_s
    else:
        hand, ranked = by_hand(workload, cluster, most_played)
    ideal = sum(rates) / (len(rates) * min(rates))
    return Outcome(file.stem, workload.name, when, planners, hand, ranked, slow_s, ideal)


def run_again(file: Path, workload: Workload, planner: str, known: dict[str, Any]) -> Outcome:
    """One planner's row of a case anew, all others as they were."""
    rows = {name: Found(**row) for name, row in known["planners"].items()}
    rows[planner] = plan_with(workload, Cluster.load(file), planner)
    hand = Found(**known["by_hand"]) if known["by_hand"] else None
    same = {name: known[name] for name in ("ranked", "as_slowest_s", "ideal")}
    when = known["when"].partition("; ")[0] + f"; {planner} {_when()}"
    return Outcome(file.stem, workload.name, when, rows, hand, **same)


def show(found: Outcome) -> bool:
    """Prints one case; whether the default search's plan is the best, made in time."""
    rows = {**found.planners, **({"by hand": found.by_hand} if found.by_hand else {})}
    print(f"\n{found.model} on {found.cluster} ({found.when}; {found.ranked} plans by hand)")
    for name, row in rows.items():
        step = f"{row.step_s:10.3f} s" if row.step_s else "   no plan  "
        gap = f"gap {row.gap:6.1%}" if row.gap is not None else " " * 10
        print(f"  {name:10s} {step} {gap} {row.wall_s:6.1f} s ({row.cpu_s:5.1f}) {row.words[:150]}")
    if found.share is not None:
        print(
            f"  all as the slowest {found.as_slowest_s:.3f} s; speed-up "
            f"{found.share * found.ideal:.3f} of {found.ideal:.3f}: {found.share:.1%}"
        )
    own = found.planners["auto"]
    others = [row.step_s for row in rows.values() if row.step_s]
    if own.step_s is None:
        return not others
    best = own.step_s <= min(others) * (1 + 1e-9)
    return best and own.cpu_s <= LONGEST_S


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases; results are merged into the JSON file case by case."""
    files = {path.stem: path for path in sorted((HERE / "clusters").glob("*.yaml"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", default=",".join(files), help="comma-separated")
    parser.add_argument("--models", default=",".join(VIRTUAL), help="comma-separated")
    parser.add_argument("--played", type=int, default=8, help="plans by hand to simulate")
    parser.add_argument("--again", action="store_true", help="also what the JSON file has")
    parser.add_argument(
        "--only", choices=("auto", *planner_names()), help="run this planner of known cases"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    for kind, names, known in (
        ("cluster", asked.clusters, files),
        ("model", asked.models, VIRTUAL),
    ):
        for name in names.split(","):
            if name not in known:
                parser.error(f"no {kind} {name!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if asked.json.exists():
        results = json.loads(asked.json.read_text(encoding="utf-8"))["cases"]
    failed = 0
    for cluster in asked.clusters.split(","):
        for model in asked.models.split(","):
            key = f"{model}@{cluster}"
            if key in results and not (asked.again or asked.only):
                print(f"{key}: {asked.json} has it")
                continue
            if asked.only and key in results:
                found = run_again(files[cluster], VIRTUAL[model], asked.only, results[key])
            else:
                found = run_case(files[cluster], VIRTUAL[model], asked.played)
            failed += not show(found)
            sys.stdout.flush()
            results[key] = {**asdict(found), "share": found.share}
            write_figures(asked.json, {"cases": results})
    print(f"\n{failed} cases in which the default search was beaten or took too long")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
