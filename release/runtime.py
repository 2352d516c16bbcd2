"""Step time against plain PyTorch, torch.distributed.pipelining and DDP, in interleaved pairs.

    python release/runtime.py [--json FILE] [--only plain_eager pipelining ddp noise] [--peers]

Prints every pair and the medians. `--json` writes ``{"ratios": {...}, ...}``, each ratio ours ÷
theirs:

- ``plain_eager``: one stage on one actor against the plain eager loop (GPT 4 layers d=256, batch
  8 × 128 tokens);
- ``torch_pipelining_1f1b``: two stages on 1F1B against torch's 1F1B (batch 16 × 64, M = 4);
- ``torch_pipelining_best``: two ranks on the best schedule raypar has against torch's 1F1B;
- ``ddp``: two replicas against DistributedDataParallel.

Beside them it prints raypar's best against torch's best, and, as the machine's noise, two copies of
the eager loop against each other. Every process uses one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `examples` and `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from release.ours import RayparRun, raypar_cluster, uniform_plan
from release.pairs import Rounds, System, alternate, first_losses
from release.peers import Peer, Workload, ddp, eager, pipeline

TARGETS = {
    "plain_eager": 1.03,
    "torch_pipelining_1f1b": 1.00,
    "torch_pipelining_best": 0.92,
    "ddp": 1.03,
}
SECTIONS = ("plain_eager", "pipelining", "ddp", "noise")
EAGER_LOAD = Workload(batch=8, seq_len=128)
SPLIT_LOAD = Workload(batch=16, seq_len=64)
TORCH_SCHEDULES = {  # name → stages per rank
    "1F1B": 1,
    "GPipe": 1,
    "Interleaved1F1B": 2,
    "LoopedBFS": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}
RAYPAR_SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved_1f1b": 2, "zero_bubble_h1": 1}
WARM_UP_STEPS = 3
SCREEN_ROUNDS = 3
LOSS_TOLERANCE = 2e-3
"""Three float32 steps in another order of sums; another model is off by far more."""


class Bench:
    """What the sections share: how long to measure, what to print, what was found."""

    def __init__(self, rounds: int, steps: int, microbatches: int, peers_only: bool) -> None:
        self.rounds, self.steps = rounds, steps
        self.split_load = replace(SPLIT_LOAD, microbatches=microbatches)
        self.peers_only = peers_only
        self.ratios: dict[str, float] = {}
        self.beside: dict[str, float] = {}
        self.medians_ms: dict[str, float] = {}
        self.pairs: dict[str, list[dict[str, float]]] = {}
        self.torch_schedules_ms: dict[str, float] = {}

    def measure(self, section: str, systems: list[System]) -> Rounds:
        """Runs the systems in turn, prints every round, and keeps the figures."""
        print(f"\n{section}: {self.rounds} rounds of {self.steps} steps each, ms per step")
        first_losses(systems, WARM_UP_STEPS, LOSS_TOLERANCE)
        print("  " + "  ".join(f"{s.name:>22}" for s in systems))

        def show(row: dict[str, float]) -> None:
            print("  " + "  ".join(f"{row[s.name] * 1e3:22.1f}" for s in systems), flush=True)

        found = alternate(systems, self.rounds, self.steps, show)
        for name in found.names:
            self.medians_ms[f"{section}/{name}"] = found.median(name) * 1e3
            print(
                f"  {name}: median {found.median(name) * 1e3:.1f} ms, middle half of the rounds "
                f"within {found.spread(name):.1%}"
            )
        self.pairs[section] = found.seconds
        return found

    def compare(self, key: str, found: Rounds, ours: str, theirs: str) -> None:
        """Prints one ratio, every pair of it, and its target if it has one."""
        values, median = found.ratios(ours, theirs), found.ratio(ours, theirs)
        target = TARGETS.get(key)
        (self.ratios if target is not None else self.beside)[key] = median
        verdict = (
            ""
            if target is None
            else f", target ≤ {target:.2f}: " + ("met" if median <= target else "MISSED")
        )
        print(f"  {key}: {ours} ÷ {theirs} = {median:.3f}{verdict}")
        print("    pairs: " + " ".join(f"{value:.3f}" for value in values))


@contextmanager
def running(*make: Callable[[], System]) -> Iterator[list[System]]:
    """Starts systems one after the other, and closes whatever was started."""
    with ExitStack() as stack:
        systems = []
        for start in make:
            system = start()
            stack.callback(system.close)
            systems.append(system)
        yield systems


def plain_eager(bench: Bench) -> None:
    """One stage on one actor against the loop anyone would write."""
    peers = [functools.partial(Peer, "eager", eager, 1, EAGER_LOAD)]
    ours = [_ours("raypar 1 stage", EAGER_LOAD, "1f1b")]
    with running(*peers, *([] if bench.peers_only else ours)) as systems:
        found = bench.measure("plain_eager", systems)
        if not bench.peers_only:
            bench.compare("plain_eager", found, "raypar 1 stage", "eager")


def ddp_replicas(bench: Bench) -> None:
    """Two replicas against DistributedDataParallel, one microbatch."""
    peers = [functools.partial(Peer, "DDP", ddp, 2, SPLIT_LOAD)]
    ours = [_ours("raypar 2 replicas", SPLIT_LOAD, "1f1b", replicas=2)]
    with running(*peers, *([] if bench.peers_only else ours)) as systems:
        found = bench.measure("ddp", systems)
        if not bench.peers_only:
            bench.compare("ddp", found, "raypar 2 replicas", "DDP")


def pipelining(bench: Bench) -> None:
    """Two ranks in a pipeline, each side with its 1F1B and with its best schedule."""
    load = bench.split_load
    best = _screen_torch(bench)
    names = dict.fromkeys(["1F1B", best])
    peers = [_torch(name, load) for name in names]
    ours = [
        _ours(f"raypar {name}", load, name, ranks=2, chunks=chunks)
        for name, chunks in RAYPAR_SCHEDULES.items()
    ]
    with running(*peers, *([] if bench.peers_only else ours)) as systems:
        found = bench.measure("pipelining", systems)
        if bench.peers_only:
            return
        fastest = found.fastest([f"raypar {name}" for name in RAYPAR_SCHEDULES])
        bench.compare("torch_pipelining_1f1b", found, "raypar 1f1b", "torch 1F1B")
        bench.compare("torch_pipelining_best", found, fastest, "torch 1F1B")
        bench.compare("best_against_torch_best", found, fastest, f"torch {best}")


def noise(bench: Bench) -> None:
    """The same program twice: how far from 1 a ratio may be by chance."""
    make = [functools.partial(Peer, name, eager, 1, EAGER_LOAD) for name in ("eager A", "eager B")]
    with running(*make) as systems:
        bench.compare("noise", bench.measure("noise", systems), "eager A", "eager B")


def _torch(schedule: str, load: Workload) -> Callable[[], System]:
    return functools.partial(
        Peer,
        f"torch {schedule}",
        pipeline,
        2,
        load,
        schedule=schedule,
        chunks=TORCH_SCHEDULES[schedule],
    )


def _screen_torch(bench: Bench) -> str:
    """The fastest schedule that torch has for two ranks, from a few rounds of all of them."""
    load = bench.split_load
    print(f"\ntorch's schedules, M = {load.microbatches}, median ms per step")
    with running(*(_torch(name, load) for name in TORCH_SCHEDULES)) as systems:
        first_losses(systems, WARM_UP_STEPS, LOSS_TOLERANCE)
        found = alternate(systems, SCREEN_ROUNDS, bench.steps)
    for name in TORCH_SCHEDULES:
        bench.torch_schedules_ms[name] = found.median(f"torch {name}") * 1e3
        print(f"  {name:22} {bench.torch_schedules_ms[name]:8.1f}", flush=True)
    return min(TORCH_SCHEDULES, key=bench.torch_schedules_ms.__getitem__)


def _ours(name: str, load: Workload, schedule: str, **split: int) -> Callable[[], System]:
    def start() -> RayparRun:
        plan = uniform_plan(load, schedule, **split)
        return RayparRun(load.model, load.data(), plan, name=name, optimizer=load.optimizer)

    return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--peers", action="store_true", help="measure the peers alone")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=6, help="steps of a system in one round")
    parser.add_argument("--microbatches", type=int, default=4, help="M of the pipelines")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    bench = Bench(options.rounds, options.steps, options.microbatches, options.peers)
    run = dict(zip(SECTIONS, (plain_eager, pipelining, ddp_replicas, noise), strict=True))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: quiet is below 1")
    with ExitStack() as stack:
        if not options.peers:
            stack.enter_context(raypar_cluster())
        for section in options.only:
            run[section](bench)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(bench), indent=2) + "\n")
    for key, value in {**bench.ratios, **bench.beside}.items():
        print(f"{key:26} {value:.3f}")


def _record(bench: Bench) -> dict[str, Any]:
    return {
        "ratios": bench.ratios,
        "targets": TARGETS,
        "beside": bench.beside,
        "medians_ms": bench.medians_ms,
        "torch_schedules_ms": bench.torch_schedules_ms,
        "seconds_per_step": bench.pairs,
        "workloads": {"plain_eager": asdict(EAGER_LOAD), "others": asdict(bench.split_load)},
        "machine": {
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


if __name__ == "__main__":
    main()
