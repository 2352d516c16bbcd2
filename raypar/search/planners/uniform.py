"""Planner `uniform`: S stages balanced by FLOPs and cut bytes × D replicas × M microbatches."""

from __future__ import annotations

import math

from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import MemoryPolicy, MeshSlice, Plan, ScheduleSpec, StagePlan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import Planner, register_planner

# One byte that crosses a cut, or that an element-wise op moves, weighs as much as this many FLOPs:
# the order of a device's FLOP/s over its link's bytes/s, and over its memory's.
_FLOPS_PER_CUT_BYTE = 50.0
_FLOPS_PER_BYTE = 2.0
TORCH_RANGE = ">=2.11,<2.14"


@register_planner
class UniformPlanner(Planner):
    """Stages of nearly equal work on the first devices of the cluster."""

    name = "uniform"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        groups, replicas = _shape(graph, cluster, config)
        n_stages = groups * config.chunks
        microbatches = _microbatches(graph, config, groups, replicas)
        cuts = balanced_cuts(graph, n_stages)
        bounds = [0, *cuts, len(graph.ops)]
        schedule = config.schedule
        if schedule == "auto":
            schedule = "interleaved_1f1b" if config.chunks > 1 else "1f1b"
        stages = tuple(
            StagePlan(
                first=graph.ops[bounds[s]].id,
                last=graph.ops[bounds[s + 1] - 1].id,
                mesh=_slice(s % groups, replicas),
                memory=MemoryPolicy(config.recompute),
            )
            for s in range(n_stages)
        )
        plan = Plan(
            graph_hash=graph.hash,
            params_hash=graph.params_hash,
            torch=TORCH_RANGE,
            cluster=cluster.shape,
            device=cluster.kind,
            global_batch=graph.global_batch,
            microbatches=microbatches,
            batch_dims=graph.batch_dims,
            schedule=ScheduleSpec(
                schedule, tuple((s % groups, s // groups) for s in range(n_stages))
            ),
            stages=stages,
            planner=self.name,
        )
        check_plan(plan, graph, cluster)
        return plan


def _slice(group: int, replicas: int) -> MeshSlice:
    return MeshSlice(tuple(range(group * replicas, (group + 1) * replicas)), (replicas,))


def _shape(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> tuple[int, int]:
    """(rank groups, replicas)."""
    devices = cluster.n_devices
    chunks = config.chunks
    if chunks < 1:
        raise PlanError(f"search.chunks is {chunks}; it is at least 1")
    most = len(graph.cuts) + 1
    if config.stages != "auto":
        stages = config.stages
        if stages < 1 or stages % chunks:
            raise PlanError(
                f"search.stages is {stages} with search.chunks {chunks}; it must be a positive "
                f"multiple of {chunks}"
            )
        if stages > most:
            raise PlanError(
                f"search.stages is {stages}, but the graph has {len(graph.ops)} ops and "
                f"{len(graph.cuts)} places to cut: at most {most} stages"
            )
        groups = stages // chunks
        replicas = 1 if config.replicas == "auto" else config.replicas
        if config.replicas == "auto":
            replicas = _most_replicas(graph, max(devices // groups, 1))
    elif config.replicas != "auto":
        replicas = config.replicas
        groups = max(min(devices // max(replicas, 1), most // chunks), 1)
    else:
        groups = max(min(devices, most // chunks, 8), 1)
        replicas = _most_replicas(graph, devices // groups)
    if replicas < 1:
        raise PlanError(f"search.replicas is {replicas}; it is at least 1")
    if groups * replicas > devices:
        raise PlanError(
            f"{groups} rank groups × {replicas} replicas need {groups * replicas} devices, the "
            f"cluster has {devices}; lower search.stages or search.replicas, or set search.chunks "
            f"to {math.ceil(groups * chunks * replicas / devices)}"
        )
    return groups, replicas


def _most_replicas(graph: OpGraph, devices: int) -> int:
    limit = min(devices, graph.max_replicas)
    return max(d for d in range(1, limit + 1) if graph.global_batch % d == 0)


def _microbatches(graph: OpGraph, config: SearchConfig, groups: int, replicas: int) -> int:
    if config.microbatches != "auto":
        return config.microbatches
    if graph.feels_microbatches:
        return 1  # M belongs to such a model's training recipe: only the user raises it
    wanted = 1 if groups == 1 else 4 * groups
    per_replica = graph.global_batch // replicas
    return max(m for m in range(1, min(wanted, per_replica) + 1) if per_replica % m == 0)


def balanced_cuts(graph: OpGraph, n_stages: int) -> list[int]:
    """Cut positions that minimise the heaviest stage: its work plus the bytes that enter it.

    Dynamic programming over the graph's cuts; a stage's work counts forward and twice that for
    backward, its entering bytes count for both directions.

    Raises:
        PlanError: Fewer places to cut than asked for.
    """
    if n_stages == 1:
        return []
    if len(graph.cuts) < n_stages - 1:
        raise PlanError(
            f"{n_stages} stages need {n_stages - 1} cuts, the graph has {len(graph.cuts)}"
        )
    prefix = [0.0]
    for op in graph.ops:
        prefix.append(prefix[-1] + 3 * (op.flops + _FLOPS_PER_BYTE * op.nbytes))
    crossing = _crossing_bytes(graph)
    bounds = [*graph.cuts, len(graph.ops)]
    entry = {0: 0.0, **{c: 2 * _FLOPS_PER_CUT_BYTE * crossing[c] for c in graph.cuts}}
    # best[k][i]: least heaviest load of k + 1 stages that end at bounds[i].
    best = [[prefix[b] for b in bounds]]
    choice: list[list[int]] = [[-1] * len(bounds)]
    for k in range(1, n_stages):
        row, picks = [math.inf] * len(bounds), [-1] * len(bounds)
        for i in range(k, len(bounds)):
            for j in range(i - 1, k - 2, -1):
                work = prefix[bounds[i]] - prefix[bounds[j]]
                if work >= row[i]:
                    break  # earlier starts only add work
                load = max(best[-1][j], work + entry[bounds[j]])
                if load < row[i]:
                    row[i], picks[i] = load, j
        best.append(row)
        choice.append(picks)
    at, cuts = len(bounds) - 1, []
    for k in range(n_stages - 1, 0, -1):
        at = choice[k][at]
        cuts.append(bounds[at])
    return cuts[::-1]


def _crossing_bytes(graph: OpGraph) -> list[int]:
    """Bytes that cross each position; cheap values that a stage makes itself do not count."""
    change = [0] * (len(graph.ops) + 1)
    last: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        for key in op.inputs:
            last[key] = i
    for i, op in enumerate(graph.ops):
        end = last.get(op.id)
        if end is not None and op.id not in graph.cloneable and op.id not in graph.analysis.globals:
            change[i + 1] += op.out_bytes
            if end + 1 < len(change):
                change[end + 1] -= op.out_bytes
    total, crossing = 0, []
    for delta in change:
        total += delta
        crossing.append(total)
    return crossing
