"""Random plans: the space that every plan in it must train exactly like the unsplit model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import (
    RECOMPUTE_POLICIES,
    MemoryPolicy,
    MeshSlice,
    Plan,
    ScheduleSpec,
    StagePlan,
)
from raypar.schedules.registry import schedule_names
from raypar.search.planners.uniform import TORCH_RANGE


def random_plan(
    graph: OpGraph,
    cluster: Cluster,
    *,
    seed: int = 0,
    stages: int | None = None,
    replicas: int | None = None,
    microbatches: int | None = None,
    schedules: Sequence[str] | None = None,
) -> Plan:
    """Draws a valid plan.

    Cuts fall anywhere the graph can be cut, not only between layers; stages land on devices in
    any order; a rank may hold several, also non-adjacent, stages; every stage draws its own
    recompute policy.

    Args:
        graph: The captured model.
        cluster: The devices.
        seed: Equal seeds give equal plans.
        stages: Number of stages; default: 1 in 10 plans has one, the others more.
        replicas: Replicas; default: 1 or, where exact and possible, 2 or more.
        microbatches: M; default: any divisor of what a replica gets.
        schedules: Schedules to draw from; default: all.

    Raises:
        PlanError: What is asked for does not fit the graph or the cluster.
    """
    rng = random.Random(f"raypar random plan {seed}")
    count = _replicas(rng, graph, cluster, replicas)
    groups_most = cluster.n_devices // count
    n_stages = stages if stages is not None else _stages(rng, graph, groups_most)
    if n_stages < 1 or n_stages > len(graph.cuts) + 1:
        raise PlanError(
            f"stages={n_stages}, but the graph has {len(graph.cuts)} places to cut: at most "
            f"{len(graph.cuts) + 1} stages"
        )
    cuts = sorted(rng.sample(graph.cuts, n_stages - 1))
    bounds = [0, *cuts, len(graph.ops)]
    placement = _placement(rng, n_stages, min(groups_most, n_stages))
    devices = rng.sample(range(cluster.n_devices), cluster.n_devices)
    slices = [
        MeshSlice(tuple(devices[g * count : (g + 1) * count]), (count,))
        for g in range(max(g for g, _ in placement) + 1)
    ]
    plan = Plan(
        graph_hash=graph.hash,
        params_hash=graph.params_hash,
        torch=TORCH_RANGE,
        cluster=cluster.shape,
        device=cluster.kind,
        global_batch=graph.global_batch,
        microbatches=_microbatches(rng, graph, count, microbatches),
        batch_dims=graph.batch_dims,
        schedule=ScheduleSpec(rng.choice(list(schedules or schedule_names())), placement),
        stages=tuple(
            StagePlan(
                first=graph.ops[bounds[s]].id,
                last=graph.ops[bounds[s + 1] - 1].id,
                mesh=slices[placement[s][0]],
                memory=MemoryPolicy(rng.choice(RECOMPUTE_POLICIES)),
            )
            for s in range(n_stages)
        ),
        planner=f"random_plan(seed={seed})",
    )
    check_plan(plan, graph, cluster)
    return plan


def _replicas(
    rng: random.Random, graph: OpGraph, cluster: Cluster, replicas: int | None
) -> int:
    if replicas is not None:
        return replicas
    most = min(graph.max_replicas, cluster.n_devices)
    fitting = [d for d in range(2, most + 1) if graph.global_batch % d == 0]
    if not fitting or rng.random() < 0.4:
        return 1
    return 2 if 2 in fitting and rng.random() < 0.85 else rng.choice(fitting)


def _stages(rng: random.Random, graph: OpGraph, groups: int) -> int:
    most = min(len(graph.cuts) + 1, 2 * groups + 1, 6)
    if most == 1 or rng.random() < 0.1:
        return 1
    return rng.randint(2, most)


def _placement(
    rng: random.Random, n_stages: int, groups: int
) -> tuple[tuple[int, int], ...]:
    """(rank group, chunk) of every stage: round robin, or any assignment that uses every group."""
    used = rng.randint(max(1, min(2, groups)), groups) if groups > 1 else 1
    owners = [s % used for s in range(n_stages)]
    if rng.random() < 0.5:
        owners = [*range(used), *(rng.randrange(used) for _ in range(n_stages - used))]
        rng.shuffle(owners)
    chunks = [0] * used
    placement = []
    for group in owners:
        placement.append((group, chunks[group]))
        chunks[group] += 1
    return tuple(placement)


def _microbatches(
    rng: random.Random, graph: OpGraph, replicas: int, microbatches: int | None
) -> int:
    if microbatches is not None:
        return microbatches
    share = graph.global_batch // replicas
    return rng.choice([m for m in range(1, share + 1) if share % m == 0])
