"""Planner `uniform`: S stages balanced by FLOPs and cut bytes × D replicas × M microbatches."""

from __future__ import annotations

import math

from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.balance import FLOPS_PER_CUT_BYTE, balanced_cuts
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import MemoryPolicy, MeshSlice, Plan, ScheduleSpec, StagePlan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import Planner, register_planner

TORCH_RANGE = ">=2.11,<2.14"


@register_planner
class UniformPlanner(Planner):
    """Stages of nearly equal work on the first devices of the cluster."""

    name = "uniform"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """Balances stages over the cluster's first devices; see `Planner.plan`."""
        groups, replicas = _shape(graph, cluster, config)
        recompute = "none" if config.recompute == "auto" else config.recompute
        zero = 0 if config.zero == "auto" else config.zero
        n_stages = groups * config.chunks
        microbatches = _microbatches(graph, config, groups, replicas)
        cuts = balanced_cuts(graph, n_stages, _flops_per_cut_byte(cluster, replicas))
        bounds = [0, *cuts, len(graph.ops)]
        schedule = config.schedule
        if schedule == "auto":
            schedule = "interleaved_1f1b" if config.chunks > 1 else "1f1b"
        stages = tuple(
            StagePlan(
                first=graph.ops[bounds[s]].id,
                last=graph.ops[bounds[s + 1] - 1].id,
                mesh=_slice(s % groups, replicas),
                memory=MemoryPolicy(recompute, zero),
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


def _flops_per_cut_byte(cluster: Cluster, replicas: int) -> float:
    """FLOP/s of the first device over bytes/s of its link to the next stage's."""
    if cluster.n_devices <= replicas:
        return FLOPS_PER_CUT_BYTE
    rate = cluster.node_of(0).device.peak("float32")
    return rate / cluster.link(0, replicas).bandwidth


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
