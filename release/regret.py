"""The default search against a measured grid of plans, on this machine.

    python release/regret.py [--models gpt,cnn,t5,mlp] [--part grid,search,pairs] [--plans 0:99]
                             [--calibration FILE] [--seconds 3] [--rounds 12] [--json FILE]

For every model `release._plan_grid` makes at least 64 plans for two CPU devices: all uniform ones,
other schedules, and 24 or more random ones. ``grid`` runs each of them on stage actors. ``search``
lets the default search choose a plan as `raypar.Trainer` does: from the captured model and the
calibration of `raypar probe`, and with steps of plans that it wants to see run; nothing of the grid
is known to it. ``pairs`` runs the five fastest of the grid and the choice again, in rounds in which
each takes a turn. Targets: the choice takes at most 1.03 times as long as the fastest, and the
search spent at most a fifth of the grid's time on measuring.

Steps in which other programs took cores away do not count (`raypar.train.quiet`); where hardly any
other is found, figures are corrected, and marked as disturbed. Results are merged into the JSON
file; all measurements of the grid, with the seconds of every stage, are kept beside it
(``regret_grid/<model>.json``) for comparisons of searches offline (`release._replay`). The grid can
be cut in slices: what was measured on a quiet machine is not measured again. Exits with 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import raypar
from raypar.errors import RayparError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import (
    load_calibration,
    read_calibration,
)
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.measure import Measured, Measurer
from raypar.search.plan import search
from raypar.train.config import ScalingConfig
from raypar.train.measure import RayMeasurer
from raypar.train.quiet import QUIET, Step, load
from release import simulator
from release._figures import write_figures
from release._own_cache import own_cache
from release._plan_grid import DEVICES, grid, identity
from release._replay import Row, Table
from release.ours import raypar_cluster
from release.simulator import adamw

RESULTS = Path(__file__).parent / "results" / "regret.json"
TARGETS = {"ratio": 1.03, "measuring": 0.2}
TOP = 5
Figures = dict[str, Any]


def _images() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 20, 20, generator=g), torch.randint(0, 10, (32,), generator=g)


def cnn() -> nn.Module:
    """The simulator's, with group norm: batch norm feels microbatches, and few plans compare."""
    return grouped(simulator.cnn())


def grouped(model: nn.Module) -> nn.Module:
    """Puts a group norm of four groups in the place of every batch norm."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(4, child.num_features))
        else:
            grouped(child)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    **simulator.MODELS,
    "cnn": (cnn, _images),
}


@functools.cache
def captured(name: str) -> OpGraph:
    """The graph of a model."""
    model_fn, batch = MODELS[name]
    return raypar.capture(model_fn, batch())


class Book:
    """The JSON file, and beside it a table of measurements for every model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, Figures] = {}
        if path.exists():
            self.models = json.loads(path.read_text())["models"]

    def of(self, name: str) -> Figures:
        """One model's figures."""
        return self.models.setdefault(name, {})

    def table(self, name: str) -> Table:
        """One model's measurements."""
        return Table(self.path.with_name(f"{self.path.stem}_grid") / f"{name}.json")

    def write(self, calibration: Calibration) -> None:
        """Writes everything."""
        both = {n: m for n, m in self.models.items() if "ratio" in m and "measuring" in m}
        body = {
            "targets": TARGETS,
            "ratios": {n: m["ratio"] for n, m in both.items()},
            "measuring": {n: m["measuring"] for n, m in both.items()},
            "quiet": {n: m["quiet"] for n, m in both.items()},
            "cores": os.cpu_count(),
            "calibration": calibration.note,
            "models": self.models,
        }
        write_figures(self.path, body)


def measurer(name: str, rounds: int = 6) -> RayMeasurer:
    """Runs plans of a model, one thread a device."""
    return RayMeasurer(
        captured(name), Cluster.local(DEVICES), MODELS[name][1](), adamw,
        scaling=ScalingConfig(threads_per_worker=1), rounds=rounds,
    )  # fmt: skip


# -- the grid -------------------------------------------------------------------------------


def measure_grid(name: str, book: Book, part: slice, seconds: float) -> None:
    """Runs every plan of the grid that has no figure of a quiet machine yet."""
    table = book.table(name)
    plans = grid(captured(name))
    with measurer(name) as runs:
        for origin, plan in plans[part]:
            known = table.get(plan)
            if known is None or known.measured.disturbed >= QUIET:
                try:
                    table.put(Row(origin, plan, runs.measure(plan, seconds=seconds), load()))
                except RayparError as error:
                    print(f"  did not run: {in_words(plan)}: {error}", flush=True)
                    continue
                table.write()
            row = table.rows[identity(plan)]
            print(f"  {text(row.measured)}  {origin:<8} {in_words(plan)}", flush=True)
    rows = own_rows(table)
    best = min(rows, key=lambda r: r.measured.step_s)
    book.of(name)["grid"] = {
        "plans": len(plans),
        "measured": len(rows),
        "random": sum(r.origin == "random" for r in rows),
        "measuring_s": sum(r.measured.took_s for r in rows),
        "disturbed": sum(r.measured.disturbed >= QUIET for r in rows),
        "best": in_words(best.plan),
        "best_s": best.measured.step_s,
    }


def own_rows(table: Table) -> list[Row]:
    """The rows of the grid's own plans: no search has found them."""
    return [row for row in table.rows.values() if row.origin != "search"]


def comparable(name: str, table: Table) -> list[Row]:
    """Those that train the same: batch norm makes M a part of the recipe, which is not searched."""
    rows = own_rows(table)
    if not captured(name).feels_microbatches:
        return rows
    return [row for row in rows if row.plan.microbatches == 1]


def text(found: Measured) -> str:
    """A measurement in words."""
    mark = "" if found.disturbed < QUIET else f", disturbed {found.disturbed:.0%}"
    return f"{found.step_s * 1e3:7.1f} ms ±{found.spread:.1%} ({found.steps} steps{mark})"


# -- the search -----------------------------------------------------------------------------


class Timed:
    """Passes on to a measurer, and adds up the wall time that a search spends there."""

    def __init__(self, inner: Measurer) -> None:
        self._inner = inner
        self.seconds = 0.0
        self.plans = 0

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        """See `Measurer.measure`."""
        with self._timed(1):
            return self._inner.measure(plan, seconds=seconds)

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        """See `Measurer.measure_together`."""
        with self._timed(len(plans)):
            return self._inner.measure_together(plans, seconds=seconds)

    @contextmanager
    def _timed(self, plans: int) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            self.plans += plans

    def close(self) -> None:
        """See `Measurer.close`."""
        self._inner.close()


def choose(name: str, book: Book, calibration: Calibration, config: SearchConfig) -> None:
    """Lets the default search choose."""
    began = time.perf_counter()
    with own_cache(calibration), measurer(name) as inner:
        runs = Timed(inner)
        found = search(captured(name), Cluster.local(DEVICES), config, measurer=runs)
    record = found.record
    book.of(name)["choice"] = {
        "words": in_words(found.plan),
        "plan": json.loads(found.plan.to_json()),
        "proposer": record.proposer,
        "in_grid": book.table(name).get(found.plan) is not None,
        "trials": len(record.trials),
        "stopped": record.stopped,
        "notes": list(record.notes),
        "search_s": time.perf_counter() - began,
        "measuring_s": runs.seconds,
        "measured_plans": runs.plans,
        "load": load(),
    }
    print(
        f"  chosen in {time.perf_counter() - began:.1f} s ({runs.seconds:.1f} s of them measuring "
        f"{runs.plans} plans; proposed by {record.proposer}): {in_words(found.plan)}",
        flush=True,
    )


# -- in turns -------------------------------------------------------------------------------


def measure_pairs(name: str, book: Book, rounds: int, seconds: float) -> None:
    """The choice against the grid's best, in turns."""
    model = book.of(name)
    rows = sorted(comparable(name, book.table(name)), key=lambda r: r.measured.step_s)[:TOP]
    plans = [Plan.from_json(json.dumps(model["choice"]["plan"])), *(row.plan for row in rows)]
    turns: list[list[float]] = [[] for _ in plans]

    def note(index: int, steps: list[Step]) -> None:
        turns[index].append(statistics.median(s.seconds for s in steps))

    with measurer(name, rounds) as runs:
        found = runs.measure_together(plans, seconds=seconds, on_turn=note)
    pairs: list[Figures] = []
    for index, (plan, one) in enumerate(zip(plans, found, strict=True)):
        if isinstance(one, Exception):
            raise one
        pairs.append(
            {
                "words": in_words(plan),
                "step_s": one.step_s,
                "spread": one.spread,
                "steps": one.steps,
                "disturbed": one.disturbed,
                "stages": [[s.forward_s, s.backward_s, s.optimizer_s] for s in one.stages],
                "rounds_s": turns[index],
            }
        )
        print(f"  {text(one)}  {'choice: ' if index == 0 else ''}{in_words(plan)}", flush=True)
    by_hand = min(pairs[1:], key=lambda p: p["step_s"])
    model["pairs"], model["load"] = pairs, load()
    model["ratio"] = pairs[0]["step_s"] / by_hand["step_s"]
    model["quiet"] = pairs[0]["disturbed"] < QUIET and by_hand["disturbed"] < QUIET


def summary(name: str, model: Figures) -> str:
    """The figures of a model in words."""
    line = f"{name}:"
    if "grid" in model:
        grid_ = model["grid"]
        line += (
            f" {grid_['measured']} of {grid_['plans']} plans ({grid_['random']} random, "
            f"{grid_['disturbed']} disturbed) in {grid_['measuring_s']:.0f} s;"
        )
    if "measuring" in model:
        line += f" search measured {model['measuring']:.1%} of that (≤ {TARGETS['measuring']:.0%});"
    if "ratio" in model:
        marked = "" if model["quiet"] else ", DISTURBED"
        line += f" choice ÷ best {model['ratio']:.3f} (≤ {TARGETS['ratio']}{marked})"
    return line


def met(model: Figures) -> bool:
    """Whether a model's figures reach the targets."""
    return bool(
        "ratio" in model
        and "measuring" in model
        and model["ratio"] <= TARGETS["ratio"]
        and model["measuring"] <= TARGETS["measuring"]
    )


# -- a run ----------------------------------------------------------------------------------


def run(name: str, book: Book, calibration: Calibration, args: argparse.Namespace) -> None:
    """The parts of a model that are asked for."""
    parts = args.part.split(",")
    first, last = (int(n) for n in args.plans.split(":"))
    model = book.of(name)
    if "grid" in parts:
        measure_grid(name, book, slice(first, last), args.seconds)
        book.write(calibration)
    if "search" in parts:
        config = SearchConfig() if args.trials is None else SearchConfig(trials=args.trials)
        choose(name, book, calibration, config)
    if "grid" in model and "choice" in model:
        model["measuring"] = model["choice"]["measuring_s"] / model["grid"]["measuring_s"]
    if "pairs" in parts:
        measure_pairs(name, book, args.rounds, args.rounds * args.turn)
    book.write(calibration)


def main() -> int:
    """Runs the slice asked for; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--part", default="grid,search,pairs")
    parser.add_argument("--plans", default="0:999", help="first:last of the grid")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps of a grid plan")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a turn in pairs")
    parser.add_argument("--trials", type=int, help="of the search; default: the search's own")
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
            run(name, book, use, args)
            print(summary(name, book.of(name)), flush=True)
    return int(not all(met(book.of(name)) for name in names))


if __name__ == "__main__":
    sys.exit(main())
