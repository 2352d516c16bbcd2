"""The planner against all plans that a person would try by hand, measured on this machine.

    python release/auto.py [--models gpt,cnn,t5,mlp] [--part grid,pairs] [--calibration FILE]
                           [--rounds 12] [--json FILE]

For every model the planner `alpa` chooses a plan for two CPU devices, from nothing but the captured
model and the calibration of `raypar probe`. Against it stands the grid of all uniform plans: stages
× replicas × tensor parallelism × microbatches × recomputation; every one is run on stage actors.
Then the five fastest of the grid and the choice are measured again, in rounds in which each runs a
few steps. The target: the choice takes at most 1.05 times as long as the fastest.

Steps in which other programs took cores away do not count (`release.undisturbed`); where hardly
any other is found, figures are corrected, and marked. Results are merged into the JSON file plan by
plan, so that a run can be cut in slices. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import raypar
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration, read_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import contest, in_words
from raypar.search.planners.alpa import AlpaSearch
from release import simulator
from release.ours import raypar_cluster
from release.simulator import adamw, spearman
from release.undisturbed import CountedRun, Figure, Step, figure_of, load

RESULTS = Path(__file__).parent / "results" / "auto.json"
TARGET = 1.05
DEVICES, TOP = 2, 5
MICROBATCHES = (1, 2, 4, 8)
WARM_UP, GRID_STEPS, GRID_S, ROUND_STEPS = 3, 8, 4.0, 4
Row = dict[str, Any]


def _images() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 20, 20, generator=g), torch.randint(0, 10, (32,), generator=g)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    **simulator.MODELS,
    "cnn": (simulator.cnn, _images),
}


@functools.cache
def captured(name: str) -> OpGraph:
    """The graph of a model."""
    model_fn, batch = MODELS[name]
    return raypar.capture(model_fn, batch())


def grid(name: str) -> Iterator[Plan]:
    """Every uniform plan of a model on the devices."""
    graph, cluster = captured(name), Cluster.local(DEVICES)
    sizes = range(1, DEVICES + 1)
    for stages, replicas, tensor in itertools.product(sizes, repeat=3):
        if stages * replicas * tensor > DEVICES:
            continue
        for microbatches, recompute in itertools.product(MICROBATCHES, RECOMPUTE_POLICIES):
            config = SearchConfig(
                planner="uniform", stages=stages, replicas=replicas, tensor=tensor,
                microbatches=microbatches, recompute=recompute,
            )  # fmt: skip
            try:
                yield raypar.plan(graph, cluster, config)
            except PlanError:  # the batch does not divide, or samples may not be parted
                continue


def choice(name: str, calibration: Calibration) -> tuple[Plan, float]:
    """The planner's plan, and the seconds that the search took."""
    began = time.perf_counter()
    config = SearchConfig(planner="alpa")
    plan = AlpaSearch(captured(name), Cluster.local(DEVICES), config, calibration).run()
    return plan, time.perf_counter() - began


def predicted(name: str, plan: Plan, calibration: Calibration) -> float:
    """Simulated seconds of a step, as the planner sees it."""
    cluster = Cluster.local(DEVICES)
    (entry,) = contest([plan], captured(name), cluster, calibration, schedule=plan.schedule.name)
    return entry.step_s


def started(name: str, plan: Plan, label: str = "") -> CountedRun:
    """The plan on actors."""
    return CountedRun(captured(name), MODELS[name][1](), plan, adamw, label)


def row_of(found: Figure, steps: Sequence[Step]) -> Row:
    """What is kept of a measurement."""
    return {
        "step_s": found.seconds,
        "wall_median_s": statistics.median(s.seconds for s in steps),
        "cpu_s": found.cpu,
        "quiet": found.quiet,
        "steps": len(steps),
        "disturbed": found.disturbed,
        "load": load(),
    }


class Book:
    """The JSON file: model → its grid, its choice and the pairs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, Row] = {}
        if path.exists():
            self.models = json.loads(path.read_text())["models"]

    def of(self, name: str) -> Row:
        """One model's figures."""
        return self.models.setdefault(name, {"grid": {}})

    def write(self, calibration: Calibration) -> None:
        """Writes everything."""
        body = {
            "target": TARGET,
            "ratios": {n: m["ratio"] for n, m in self.models.items() if "ratio" in m},
            "cores": os.cpu_count(),
            "calibration": calibration.note,
            "models": self.models,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        spare = self.path.with_suffix(".part")
        spare.write_text(json.dumps(body, indent=1) + "\n")
        spare.replace(self.path)


def measure_grid(name: str, book: Book, calibration: Calibration) -> None:
    """Runs every uniform plan that has no figure of quiet steps yet."""
    rows = book.of(name)["grid"]
    for plan in grid(name):
        label = in_words(plan)
        if not rows.get(label, {}).get("quiet"):
            run = started(name, plan)
            try:
                steps = run.until_quiet(WARM_UP, GRID_STEPS, GRID_S)
            finally:
                run.close()
            rows[label] = row_of(figure_of(steps), steps)
        rows[label]["predicted_s"] = predicted(name, plan, calibration)
        book.write(calibration)
        print(f"  {text(rows[label])}  {label}", flush=True)


def text(row: Row) -> str:
    """One line of a table."""
    return (
        f"measured {row['step_s'] * 1e3:7.1f} ms, predicted {row['predicted_s'] * 1e3:7.1f} ms "
        f"({row['predicted_s'] / row['step_s'] - 1:+5.0%}; quiet {row['quiet']}/{row['steps']}, "
        f"disturbed {row['disturbed']:.0%})"
    )


def measure_pairs(name: str, book: Book, calibration: Calibration, rounds: int) -> None:
    """The choice against the grid's best, in turns."""
    model = book.of(name)
    own, took = choice(name, calibration)
    print(f"  chosen in {took:.1f} s: {in_words(own)}")
    best = sorted(model["grid"], key=lambda label: model["grid"][label]["step_s"])[:TOP]
    plans = {in_words(p): p for p in grid(name)}
    systems: list[CountedRun] = []
    with ExitStack() as stack:
        for label, plan in [("choice", own), *((label, plans[label]) for label in best)]:
            systems.append(started(name, plan, label))
            stack.callback(systems[-1].close)
        found: dict[str, list[Step]] = {s.name: [] for s in systems}
        walls: dict[str, list[float]] = {s.name: [] for s in systems}
        for system in systems:
            system.steps(WARM_UP)
        for index in range(rounds):
            turn = index % len(systems)
            for system in [*systems[turn:], *systems[:turn]]:
                steps = system.steps(ROUND_STEPS)
                found[system.name] += steps
                walls[system.name].append(statistics.median(s.seconds for s in steps))
    figures = {label: row_of(figure_of(steps), steps) for label, steps in found.items()}
    for label, plan in {"choice": own, **{b: plans[b] for b in best}}.items():
        figures[label]["predicted_s"] = predicted(name, plan, calibration)
        print(f"  {text(figures[label])}  {label}")
    hand = min(best, key=lambda label: figures[label]["step_s"])
    by_wall = min(best, key=lambda label: statistics.median(walls[label]))
    model["choice"] = {"plan": in_words(own), "search_s": took}
    model["pairs"], model["rounds_s"] = figures, walls
    model["ratio"] = figures["choice"]["step_s"] / figures[hand]["step_s"]
    model["wall_ratio"] = statistics.median(walls["choice"]) / statistics.median(walls[by_wall])
    book.write(calibration)


def summary(name: str, model: Row) -> str:
    """The figures of a model in words."""
    rows = list(model["grid"].values())
    order = spearman([r["predicted_s"] for r in rows], [r["step_s"] for r in rows])
    error = statistics.mean(abs(r["predicted_s"] / r["step_s"] - 1) for r in rows)
    line = f"{name}: {len(rows)} uniform plans, predicted within {error:.0%}, Spearman {order:.2f}"
    if "ratio" in model:
        line += (
            f"; choice ÷ best by hand {model['ratio']:.3f} (plain medians "
            f"{model['wall_ratio']:.3f}), target ≤ {TARGET}"
        )
    return line


def main() -> int:
    """Runs the slice asked for; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--part", default="grid,pairs")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = Cluster.local(DEVICES)
    use = read_calibration(args.calibration) if args.calibration else load_calibration(own)
    if not use.measured:
        print("no calibration of this machine: run `raypar probe` first", file=sys.stderr)
        return 1
    book = Book(args.json)
    names = args.models.split(",")
    with raypar_cluster():
        for name in names:
            print(f"{name} (load average {load():.1f})", flush=True)
            if "grid" in args.part:
                measure_grid(name, book, use)
            if "pairs" in args.part:
                measure_pairs(name, book, use, args.rounds)
            print(summary(name, book.of(name)), flush=True)
    done = [book.of(name) for name in names if "ratio" in book.of(name)]
    return int(not done or any(m["ratio"] > TARGET for m in done))


if __name__ == "__main__":
    sys.exit(main())
