"""Bytes that stage actors keep for parameters, gradients and optimizer states: as planned?

    python release/sharded_memory.py [--json FILE]

Trains a GPT for two steps with AdamW on stage actors of a private Ray: on one rank, then on 4 ranks
with every ZeRO level over replicas, then on meshes where ops are sharded too, with stages of unlike
meshes. After the last step each actor adds up the distinct storages of its parameters, gradients
and optimizer states. Beside that stands what was predicted from the plan alone
(`raypar.stages.accounts.predicted_memory`, from the parameters' layouts). A line per plan; exits
with 1 if an actor is off by more than 2 %, or if ZeRO-3 on 4 ranks takes more than 0.27 of what one
rank takes alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from raypar import Cluster, capture
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.plan import Plan
from raypar.stages.accounts import predicted_memory
from raypar.stages.compile import compile_plan
from raypar.stages.remote import RayRun
from raypar.testing import random_plan, random_sharding
from raypar.testing.backends import RepeatFeed
from raypar.testing.equivalence import default_optimizer
from release._figures import about, write_figures
from release._gpt import Gpt, random_ids

RANKS = 4
STEPS = 2
ADAMW_STATES = 2
BATCH, LENGTH, VOCABULARY = 8, 16, 1024
GPT = partial(Gpt, layers=4, width=256, heads=8, vocabulary=VOCABULARY, length=LENGTH)
OFF, ZERO3 = 0.02, 0.27
PARTS = ("parameters", "gradients", "optimizer", "total")


@dataclass
class Line:
    """One plan.

    Attributes:
        plan: In words.
        zero: ZeRO level of its stages.
        measured: For every rank its bytes.
        predicted: The same before anything ran.
        off: |measured ÷ predicted − 1| of the worst rank and part.
        of_one: Bytes of the largest rank over those of one rank alone.
    """

    plan: str
    zero: int
    measured: list[dict[str, int]]
    predicted: list[dict[str, int]]
    off: float
    of_one: float = 1.0

    def text(self) -> str:
        """The line as it is printed."""
        largest = max(self.measured, key=lambda m: m["total"])
        parts = "  ".join(f"{part} {largest[part] / 2**20:6.2f} MiB" for part in PARTS)
        return (
            f"{self.plan:<40} ZeRO {self.zero}  largest rank: {parts}  "
            f"{self.of_one:.3f} of one rank's  off {self.off:.2%}"
        )


def predictions(graph: OpGraph, plan: Plan) -> list[dict[str, int]]:
    """What the layouts of a plan's parameters say, by rank."""
    lowered = lower_plan(graph, plan)
    sizes = {
        name: getattr(torch, dtype.removeprefix("torch.")).itemsize
        for name, (_, dtype, _) in graph.params.items()
    }
    meshes = {g: s.mesh for (g, _), s in zip(plan.schedule.placement, plan.stages, strict=True)}
    found: list[dict[str, int]] = []
    for group in sorted(meshes):
        mesh = meshes[group]
        rank = predicted_memory(lowered.layouts[group], mesh.named, ADAMW_STATES, itemsize=sizes)
        found += [rank] * len(mesh.devices)
    return found


def measure(name: str, graph: OpGraph, plan: Plan, batch: torch.Tensor) -> Line:
    """Trains with a plan on stage actors and asks them."""
    specs = compile_plan(graph, plan, optimizer=default_optimizer, threads=1)
    with RayRun(specs, feed=partial(RepeatFeed, tensors=[batch])) as run:
        run.train(0, STEPS)
        measured = run.memory()
    predicted = predictions(graph, plan)
    off = max(
        abs(found[part] / wanted[part] - 1)
        for found, wanted in zip(measured, predicted, strict=True)
        for part in PARTS
    )
    zero = max(stage.memory.zero for stage in plan.stages)
    return Line(name, zero, measured, predicted, off)


def with_zero(plan: Plan, zero: int) -> Plan:
    """The plan with a ZeRO level on all of its stages."""
    stages = tuple(
        dataclasses.replace(s, memory=dataclasses.replace(s.memory, zero=zero)) for s in plan.stages
    )
    return dataclasses.replace(plan, stages=stages)


def plans(graph: OpGraph) -> list[tuple[str, Plan]]:
    """What is measured, and its names."""
    alone, several = Cluster.local(1), Cluster.local(RANKS)
    replicas = random_plan(graph, several, stages=1, replicas=RANKS, microbatches=1)
    found = [("one rank", random_plan(graph, alone, stages=1, replicas=1, microbatches=2))]
    found += [(f"{RANKS} replicas", with_zero(replicas, zero)) for zero in range(4)]
    one = random_plan(graph, several, stages=1, replicas=1, microbatches=2)
    two = random_plan(graph, several, seed=1, stages=2, replicas=1, microbatches=2)
    both = random_plan(graph, several, seed=1, stages=1, replicas=2, microbatches=2)
    wanted: Sequence[tuple[str, Plan, list[tuple[int, ...]]]] = (
        ("ops sharded on (4)", one, [(4,)]),
        ("ops sharded on (2, 2)", one, [(2, 2)]),
        ("2 replicas × ops sharded on (2)", both, [(2,)]),
        ("2 stages, ops sharded on (2) and (1)", two, [(2,), ()]),
    )
    for name, plan, meshes in wanted:
        for zero in (0, 3):
            drawn = random_sharding(graph, plan, several, seed=3, meshes=meshes, zero=[zero])
            found.append((name, drawn))
    return found


def main() -> int:
    """Measures every plan; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = random_ids(VOCABULARY, BATCH, LENGTH)
    graph = capture(GPT, batch)
    lines: list[Line] = []
    from raypar.train.session import start_private_ray

    with start_private_ray(RANKS):
        for name, plan in plans(graph):
            line = measure(name, graph, plan, batch)
            largest = max(m["total"] for m in line.measured)
            line.of_one = largest / (lines[0] if lines else line).measured[0]["total"]
            lines.append(line)
            print(line.text(), flush=True)
    off = max(line.off for line in lines)
    replicated = [line for line in lines if line.plan == f"{RANKS} replicas" and line.zero == 3]
    zero3 = max(line.of_one for line in replicated)
    good = off <= OFF and zero3 <= ZERO3
    print(
        f"{len(lines)} plans: measured within {off:.2%} of the plan (limit {OFF:.0%}); ZeRO-3 on "
        f"{RANKS} ranks takes {zero3:.3f} of one rank's (limit {ZERO3}): "
        + ("ok" if good else "MISSED")
    )
    if args.json:
        body: dict[str, Any] = {
            "off": off,
            "zero3_of_one_rank": zero3,
            **about(),
            "lines": [asdict(line) for line in lines],
        }
        write_figures(args.json, body)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
