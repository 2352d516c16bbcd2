"""Plans that a patient person would try, for one model on two devices: what a search is held to.

All uniform plans (stages × replicas × tensor parallelism × microbatches × recomputation), the same
two stages under every other schedule, and random plans: cuts anywhere, stages in any order and
several on a device.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import raypar
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.search.config import SearchConfig
from raypar.testing import random_plan

DEVICES = 2
MICROBATCHES = (1, 2, 4, 8)
LEAST, LEAST_RANDOM = 64, 24
_DRAWS = 2000


def grid(graph: OpGraph) -> list[tuple[str, Plan]]:
    """(origin, plan) of at least `LEAST` plans that differ in what they do.

    Origin is ``uniform``, ``schedule`` or ``random``.
    """
    found: dict[str, tuple[str, Plan]] = {}
    for plan in uniform_plans(graph):
        found.setdefault(identity(plan), ("uniform", plan))
    for plan in scheduled_plans(graph):
        found.setdefault(identity(plan), ("schedule", plan))
    wanted = max(LEAST, len(found) + LEAST_RANDOM)
    for plan in random_plans(graph):
        if len(found) == wanted:
            break
        found.setdefault(identity(plan), ("random", plan))
    return list(found.values())


def uniform_plans(graph: OpGraph) -> Iterator[Plan]:
    """Every uniform plan on the devices."""
    sizes = range(1, DEVICES + 1)
    for stages, replicas, tensor in itertools.product(sizes, repeat=3):
        if stages * replicas * tensor > DEVICES:
            continue
        for microbatches, recompute in itertools.product(MICROBATCHES, RECOMPUTE_POLICIES):
            yield from _uniform(
                graph, stages=stages, replicas=replicas, tensor=tensor,
                microbatches=microbatches, recompute=recompute,
            )  # fmt: skip


def scheduled_plans(graph: OpGraph) -> Iterator[Plan]:
    """Two stages under every schedule, and four, two on each device."""
    for microbatches in MICROBATCHES[1:]:
        for schedule in ("gpipe", "1f1b", "zero_bubble_h1"):
            yield from _uniform(graph, stages=2, microbatches=microbatches, schedule=schedule)
        yield from _uniform(
            graph, stages=4, chunks=2, microbatches=microbatches, schedule="interleaved_1f1b"
        )


def _uniform(graph: OpGraph, **options: Any) -> Iterator[Plan]:
    try:
        yield raypar.plan(graph, Cluster.local(DEVICES), SearchConfig(planner="uniform", **options))
    except PlanError:  # the batch does not divide, or samples may not be parted
        return


def random_plans(graph: OpGraph) -> Iterator[Plan]:
    """Random plans with microbatches of a size that measures work, not overheads."""
    for seed in range(_DRAWS):
        plan = random_plan(graph, Cluster.local(DEVICES), seed=seed)
        if plan.microbatches <= max(MICROBATCHES):
            yield plan


def bare(plan: Plan) -> Plan:
    """The plan without what was thought of it, its devices named in the order of their use."""
    order: dict[int, int] = {}
    for stage in plan.stages:
        for device in stage.mesh.devices:
            order.setdefault(device, len(order))
    stages = tuple(
        replace(
            stage,
            mesh=replace(stage.mesh, devices=tuple(order[d] for d in stage.mesh.devices)),
            predicted={},
        )
        for stage in plan.stages
    )
    return replace(
        plan, stages=stages, predicted={}, alternatives={}, certificate={}, planner="manual"
    )


def identity(plan: Plan) -> str:
    """Equal for plans that run alike where all devices are alike."""
    text = json.dumps(json.loads(bare(plan).to_json()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
