"""Random plans: the space that every plan in it must train exactly like the unsplit model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from raypar.errors import PlanError, ScheduleError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import (
    RECOMPUTE_POLICIES,
    MemoryPolicy,
    MeshSlice,
    Plan,
    StagePlan,
)
from raypar.schedules.base import Placement
from raypar.schedules.registry import get_schedule, schedule_names

_ONE_REPLICA = 0.42  # this share of plans has one replica where more are exact
_LARGE_M = 0.75


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
    recompute policy. The number of stages, of replicas, of microbatches and the schedule follow a
    low-discrepancy sequence over the seeds, so that a few consecutive seeds cover all of them.

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
    by_replicas, by_stages, by_parts, by_schedule = _spread(seed)
    count = _replicas(by_replicas, graph, cluster, replicas, microbatches)
    groups_most = cluster.n_devices // count
    n_stages = stages if stages is not None else _stages(by_stages, graph, groups_most)
    if n_stages < 1 or n_stages > len(graph.cuts) + 1:
        raise PlanError(
            f"stages={n_stages}, but the graph has {len(graph.cuts)} places to cut: take 1 to "
            f"{len(graph.cuts) + 1} stages"
        )
    cuts = sorted(rng.sample(graph.cuts, n_stages - 1))
    bounds = [0, *cuts, len(graph.ops)]
    placement = _placement(rng, n_stages, min(groups_most, n_stages))
    parts = _microbatches(by_parts, graph, count, microbatches)
    schedule = _schedule(by_schedule, placement, parts, schedules)
    devices = rng.sample(range(cluster.n_devices), cluster.n_devices)
    slices = [
        MeshSlice(tuple(devices[g * count : (g + 1) * count]), (count,))
        for g in range(max(g for g, _ in placement) + 1)
    ]
    chosen = [
        StagePlan(
            first=graph.ops[bounds[s]].id,
            last=graph.ops[bounds[s + 1] - 1].id,
            mesh=slices[placement[s][0]],
            memory=MemoryPolicy(rng.choice(RECOMPUTE_POLICIES)),
        )
        for s in range(n_stages)
    ]
    plan = Plan.of(
        graph,
        cluster,
        chosen,
        microbatches=parts,
        schedule=schedule,
        placement=placement,
        planner=f"random_plan(seed={seed})",
    )
    check_plan(plan, graph, cluster)
    return plan


def _spread(seed: int) -> tuple[float, ...]:
    """Four numbers in [0, 1) that fill the cube evenly over consecutive seeds.

    Multiples of square roots modulo 1, a Kronecker sequence (Kuipers and Niederreiter, "Uniform
    Distribution of Sequences", 1974, chapter 1.6). The roots are those, of some hundred sets tried,
    with which 20 consecutive seeds cover replicas, microbatches and schedules best.
    """
    place = seed % (1 << 32)
    return tuple((0.5 + place * math.sqrt(n)) % 1.0 for n in (7, 13, 6, 21))


def _replicas(
    at: float, graph: OpGraph, cluster: Cluster, replicas: int | None, microbatches: int | None
) -> int:
    if replicas is not None:
        if not 1 <= replicas <= cluster.n_devices:
            raise PlanError(
                f"replicas={replicas}, but the cluster has {cluster.n_devices} devices: take 1 to "
                f"{cluster.n_devices}"
            )
        return replicas
    most = min(graph.max_replicas, cluster.n_devices)
    parts = max(microbatches or 1, 1)
    fitting = [d for d in range(2, most + 1) if graph.global_batch % (d * parts) == 0]
    if not fitting or at < _ONE_REPLICA:
        return 1
    rest = (at - _ONE_REPLICA) / (1 - _ONE_REPLICA)
    if 2 in fitting and rest < 0.96:
        return 2
    return fitting[int(rest * 997) % len(fitting)]


def _stages(at: float, graph: OpGraph, groups: int) -> int:
    most = min(len(graph.cuts) + 1, 2 * groups + 1, 6)
    if most == 1 or at < 0.1:
        return 1
    return 2 + int((at - 0.1) / 0.9 * (most - 1))


def _placement(rng: random.Random, n_stages: int, groups: int) -> tuple[tuple[int, int], ...]:
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


def _microbatches(at: float, graph: OpGraph, replicas: int, microbatches: int | None) -> int:
    if microbatches is not None:
        if microbatches < 1:
            raise PlanError(f"microbatches={microbatches}; it is at least 1")
        return microbatches
    share = graph.global_batch // replicas
    fitting = [m for m in range(1, share + 1) if share % m == 0]
    # The largest fit with one replica only: draw them more often, so that they are not rare.
    return fitting[int(at**_LARGE_M * len(fitting))]


def _schedule(
    at: float,
    placement: tuple[tuple[int, int], ...],
    microbatches: int,
    schedules: Sequence[str] | None,
) -> str:
    """One of the schedules that take this placement."""
    names = list(schedules if schedules is not None else schedule_names())
    stages_on = Placement.of(tuple(group for group, _ in placement))
    fitting, refusal = [], "none is named"
    for name in names:
        try:
            schedule = get_schedule(name)
        except ScheduleError as error:
            raise PlanError(f"schedules={names}: {error}") from None
        try:
            schedule.check(stages_on, microbatches)
        except ScheduleError as error:
            refusal = str(error)
        else:
            fitting.append(name)
    if not fitting:
        raise PlanError(f"schedules={names}: no one takes the drawn placement: {refusal}")
    return fitting[int(at * len(fitting))]
