"""Does the study earn its place? Its plans against other searches with as many measurements.

    python release/study.py [--models gpt,cnn,t5,mlp] [--seeds 0:5] [--budget 10]
                            [--part search,settle,final] [--rounds 12] [--starts 5] [--json FILE]

Every search may run `budget` plans on two CPU devices, for every model and seed:

- ``study``: planner ``optuna`` as it is by default (seeds of the exact planners, learned model);
- ``unseeded``: the same without seeds;
- ``random``: proposals of the same space at random, each one run;
- ``tpe``: proposals of Optuna's TPE, each one run and told: black-box search without a model;
- ``alpa``, ``piper``, ``placement``: the one plan of each exact planner.

Inner decisions (cuts, shardings) are the solvers' in all of them. A plan that several searches run
is measured once (the table beside the JSON file, which begins with the grid's of
`release/regret.py`), so that they are told the same. Plans are measured minutes apart, and the
machine's speed drifts by more than the best of them differ. Therefore ``settle`` runs the fastest
plans of the table in turns, keeps these figures, and repeats all searches with them. ``final`` runs
the plans that the searches chose again, in turns, with `starts` starts of processes; the medians of
these figures are compared. No search knows measurements of an earlier one.

Targets: the study's median over the seeds is at most every other's; without seeds within 1.05 of
it; and it reaches TPE's last value in at most half as many measurements, on 3 of 4 models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optuna
import torch

import raypar
from raypar.errors import RayparError
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.interop.workbench import Workbench
from raypar.search.measure import Measured, Measurer, StageSeconds
from raypar.search.plan import search
from raypar.search.study.draft import Drafter, InfeasibleError
from raypar.search.study.samplers import quiet_optuna, sampler_of
from raypar.search.study.seeds import SEEDS
from raypar.search.study.space import Decisions, Space
from raypar.train.quiet import load
from release._figures import write_figures
from release._own_cache import own_cache
from release._plan_grid import DEVICES, identity
from release._replay import ReplayMeasurer, Row, Table
from release.ours import raypar_cluster
from release.regret import MODELS, captured, measurer

RESULTS = Path(__file__).parent / "results" / "study.json"
SEARCHES = ("study", "unseeded", "random", "tpe")
SECONDS = 3.0
SETTLED = 0.25
"""Plans within this share of the table's fastest are run in turns."""
_PENALTY = 10.0
_MOST_ASKED = 400
Figures = dict[str, Any]


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    Attributes:
        plan: Its choice.
        path: Least measured step in seconds, after every measurement.
        seconds: Wall time without measurements that were in the table.
        proposer: Who proposed the choice.
    """

    plan: Plan
    path: list[float]
    seconds: float
    proposer: str


class Counting:
    """A measurer that notes what it is asked for, one plan after the other.

    What the study runs a second time, to choose among the best, is answered from the first time.
    """

    def __init__(self, inner: Measurer) -> None:
        self.inner = inner
        self.ran: list[tuple[Plan, float]] = []

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        """See `Measurer.measure`."""
        found = self.inner.measure(plan, seconds=seconds)
        self.ran.append((plan, found.step_s))
        return found

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        """See `Measurer.measure_together`."""
        return self.inner.measure_together(plans, seconds=seconds)

    def close(self) -> None:
        """See `Measurer.close`."""

    @property
    def path(self) -> list[float]:
        """Least step time after every measurement."""
        steps = [step_s for _, step_s in self.ran]
        return [min(steps[: i + 1]) for i in range(len(steps))]


def by_study(name: str, run: Measurer, budget: int, seed: int, *, seeded: bool) -> Searched:
    """The default search."""
    counting = Counting(run)
    config = SearchConfig(
        planner="optuna", seed=seed, trials=64, measure=budget, seeds="auto" if seeded else ()
    )
    began = time.perf_counter()
    found = search(captured(name), Cluster.local(DEVICES), config, measurer=counting)
    took = time.perf_counter() - began
    return Searched(found.plan, counting.path, took, found.record.proposer)


def by_proposals(name: str, run: Measurer, budget: int, seed: int, *, sampler: str) -> Searched:
    """Proposals of a sampler, each one run."""
    counting = Counting(run)
    config = SearchConfig(planner="optuna", sampler=sampler, seed=seed, cost_model="analytic")
    bench = Workbench(captured(name), Cluster.local(DEVICES), config)
    space = Space(bench)
    drafter = Drafter(space)
    known: dict[Decisions, float] = {}
    began = time.perf_counter()
    with quiet_optuna():
        study = optuna.create_study(sampler=sampler_of(sampler, seed))
        for _ in range(_MOST_ASKED):
            if len(counting.ran) >= budget:
                break
            trial = study.ask()
            decisions = space.suggest(trial)
            if decisions not in known:
                known[decisions] = _value(decisions, drafter, bench, counting)
            value = known[decisions]
            trial.set_constraint("memory", 1.0 if value == float("inf") else 0.0)
            study.tell(trial, min(value, _PENALTY * max(counting.path, default=1.0)))
    plan, _ = min(counting.ran, key=lambda pair: pair[1])
    return Searched(plan, counting.path, time.perf_counter() - began, sampler)


def _value(decisions: Decisions, drafter: Drafter, bench: Workbench, counting: Counting) -> float:
    try:
        return counting.measure(drafter.draft(decisions).plan(bench), seconds=SECONDS).step_s
    except (InfeasibleError, RayparError):
        return float("inf")


def by_planner(name: str, run: Measurer, planner: str) -> Searched:
    """The plan of an exact planner."""
    began = time.perf_counter()
    plan = raypar.plan(captured(name), Cluster.local(DEVICES), SearchConfig(planner=planner))
    took = time.perf_counter() - began
    return Searched(plan, [run.measure(plan, seconds=SECONDS).step_s], took, planner)


def searches(name: str, run: Measurer, budget: int, seed: int) -> dict[str, Callable[[], Searched]]:
    """Every search that depends on a seed."""
    return {
        "study": lambda: by_study(name, run, budget, seed, seeded=True),
        "unseeded": lambda: by_study(name, run, budget, seed, seeded=False),
        "random": lambda: by_proposals(name, run, budget, seed, sampler="random"),
        "tpe": lambda: by_proposals(name, run, budget, seed, sampler="tpe"),
    }


class Book:
    """The JSON file, and the tables beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, Figures] = {}
        if path.exists():
            self.models = json.loads(path.read_text())["models"]

    def of(self, name: str) -> Figures:
        """One model's figures."""
        return self.models.setdefault(name, {"searches": {}, "final": {}})

    def table(self, name: str) -> Table:
        """One model's measurements, those of the grid among them."""
        table = Table(self.path.with_name(f"{self.path.stem}_table") / f"{name}.json")
        for row in Table(self.path.with_name("regret_grid") / f"{name}.json").rows.values():
            if table.get(row.plan) is None:
                table.put(row)
        return table

    def write(self, table: Table | None = None) -> None:
        """Writes everything."""
        write_figures(self.path, {"cores": os.cpu_count(), "models": self.models})
        if table is not None:
            table.write()


def run_searches(
    name: str, book: Book, seeds: range, budget: int, calibration: Calibration
) -> None:
    """Runs every search that is not in the book."""
    table = book.table(name)
    model = book.of(name)
    real = measurer(name)
    run = ReplayMeasurer(table, real)
    try:
        jobs: dict[str, Callable[[], Searched]] = {
            planner: (lambda planner=planner: by_planner(name, run, planner))  # type: ignore[misc]
            for planner in SEEDS
        }
        for seed in seeds:
            jobs |= {
                f"{kind} {seed}": job for kind, job in searches(name, run, budget, seed).items()
            }
        for label, job in jobs.items():
            if label in model["searches"]:
                continue
            with own_cache(calibration):
                try:
                    found = job()
                except RayparError as error:
                    print(f"  {label}: {error}", flush=True)
                    continue
            table.put(table.get(found.plan) or Row("search", found.plan, _none(), load()))
            model["searches"][label] = {
                "plan": identity(found.plan),
                "words": in_words(found.plan),
                "path": found.path,
                "seconds": found.seconds,
                "proposer": found.proposer,
                "load": load(),
            }
            book.write(table)
            best = f"{found.path[-1] * 1e3:7.1f} ms after {len(found.path):2d}"
            print(f"  {label:12s} {best}: {in_words(found.plan)}", flush=True)
    finally:
        real.close()


def _none() -> Measured:
    return Measured(float("inf"), 0.0, 0, 0.0)


def settle(name: str, book: Book, rounds: int) -> None:
    """Runs the table's fastest plans in turns, and forgets the searches made without knowing that.

    How fast the machine is just now is taken out, so that the other plans' figures stay comparable:
    in the median, the new figures are the old ones. A plan that failed now keeps its old figure:
    that it ran once shows that it can.
    """
    table = book.table(name)
    least = min(row.measured.step_s for row in table.rows.values())
    near = [row for row in table.rows.values() if row.measured.step_s <= (1 + SETTLED) * least]
    real = measurer(name, rounds)
    try:
        found = real.measure_together([row.plan for row in near], seconds=SECONDS)
    finally:
        real.close()
    pairs = [(r, m) for r, m in zip(near, found, strict=True) if isinstance(m, Measured)]
    drift = statistics.median([m.step_s / r.measured.step_s for r, m in pairs] or [1.0])
    for row, measured in pairs:
        stages = tuple(
            StageSeconds(s.forward_s / drift, s.backward_s / drift, s.optimizer_s / drift)
            for s in measured.stages
        )
        told = replace(measured, step_s=measured.step_s / drift, stages=stages)
        table.put(replace(row, measured=told, load=load()))
    book.of(name)["searches"] = {}
    book.of(name)["settled"] = len(near)
    book.write(table)
    print(f"  {len(near)} plans run in turns, at {drift:.2f} of the seconds before", flush=True)


def run_final(name: str, book: Book, rounds: int, starts: int) -> None:
    """Runs what the searches chose, in turns, and all of that in processes of their own again.

    What a plan takes differs by some percent from one start of its processes to the next.
    """
    table, model = book.table(name), book.of(name)
    chosen = sorted({s["plan"] for s in model["searches"].values()})
    plans = [table.rows[key].plan for key in chosen]
    by_start: dict[str, list[float]] = {}
    for _ in range(starts):
        real = measurer(name, rounds)
        try:
            found = real.measure_together(plans, seconds=SECONDS * 2)
        finally:
            real.close()
        for key, one in zip(chosen, found, strict=True):
            if isinstance(one, Measured):
                by_start.setdefault(key, []).append(one.step_s)
    model["final_starts"] = by_start
    model["final"] = {key: statistics.median(steps) for key, steps in by_start.items()}
    model["final_load"] = load()
    book.write()


def summary(name: str, model: Figures) -> list[str]:
    """Medians over the seeds, and targets that were missed."""
    final, rows = model["final"], model["searches"]
    medians: dict[str, float] = {}
    for kind in (*SEARCHES, *SEEDS):
        own = [final[s["plan"]] for k, s in rows.items()
               if k.split()[0] == kind and s["plan"] in final]  # fmt: skip
        if own:
            medians[kind] = statistics.median(own)
    model["medians"] = medians
    print(f"{name}: " + ", ".join(f"{k} {v * 1e3:.1f}" for k, v in medians.items()) + " ms")
    missed = []
    for kind in (*SEARCHES[2:], *SEEDS):
        if kind in medians and medians["study"] > medians[kind]:
            missed.append(f"{name}: {kind} is {medians['study'] / medians[kind] - 1:.1%} faster")
    if medians.get("unseeded", 0.0) > 1.05 * medians["study"]:
        missed.append(f"{name}: without seeds {medians['unseeded'] / medians['study']:.3f}")
    model["half"] = reached = _needed(rows)
    print(f"  measurements to reach TPE's last value: {reached}")
    return missed


def _needed(rows: Figures) -> dict[str, float]:
    """Median count of measurements of the study until TPE's value, against TPE's own count."""
    needed, allowed = [], []
    for label, row in rows.items():
        if label.startswith("study "):
            rival = rows.get("tpe " + label.split()[1])
            if rival is not None:
                goal = rival["path"][-1] * 1.001
                hits = [i + 1 for i, step in enumerate(row["path"]) if step <= goal]
                needed.append(hits[0] if hits else float("inf"))
                allowed.append(len(rival["path"]))
    if not needed:
        return {}
    median = statistics.median(needed)
    return {"study": median if median != float("inf") else -1, "tpe": statistics.median(allowed)}


def main() -> int:
    """Runs the slice asked for; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0:5")
    parser.add_argument("--budget", type=int, default=10)
    parser.add_argument("--part", default="search,settle,final")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--starts", type=int, default=5, help="of processes, in `final`")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    calibration = load_calibration(Cluster.local(DEVICES))
    if not calibration.measured:
        print("no calibration of this machine: run `raypar probe` first", file=sys.stderr)
        return 1
    book = Book(args.json)
    first, last = (int(n) for n in args.seeds.split(":"))
    missed: list[str] = []
    halves = 0
    names = args.models.split(",")
    with raypar_cluster():
        for name in names:
            print(f"{name} (load average {load():.1f})", flush=True)
            if "search" in args.part:
                run_searches(name, book, range(first, last), args.budget, calibration)
            if "settle" in args.part:
                settle(name, book, args.rounds)
                run_searches(name, book, range(first, last), args.budget, calibration)
            if "final" in args.part:
                run_final(name, book, args.rounds, args.starts)
            if book.of(name)["final"]:
                missed += summary(name, book.of(name))
                half = book.of(name)["half"]
                halves += bool(half) and 0 < half["study"] <= half["tpe"] / 2
    book.write()
    print(f"TPE's value in half the measurements: {halves} of {len(names)} models")
    for line in missed:
        print("missed:", line)
    return int(bool(missed) or halves < min(3, len(names)))


if __name__ == "__main__":
    sys.exit(main())
