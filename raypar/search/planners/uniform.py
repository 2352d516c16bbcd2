"""Planner `uniform`: S stages balanced by FLOPs and cut bytes × D replicas × M microbatches."""

from __future__ import annotations

import math

from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.balance import FLOPS_PER_CUT_BYTE, balanced_cuts
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MemoryPolicy, MeshSlice, Plan, StagePlan
from raypar.search.config import SearchConfig
from raypar.search.interop.space import AXIS_NAMES, Split
from raypar.search.interop.units import find_units
from raypar.search.planners.base import Planner, register_planner
from raypar.sharding.strategies import fold_patterns


@register_planner
class UniformPlanner(Planner):
    """Stages of nearly equal work on the first devices of the cluster."""

    name = "uniform"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """Balances stages over the cluster's first devices; see `Planner.plan`."""
        tensor = 1 if config.tensor == "auto" else config.tensor
        groups, replicas = _shape(graph, cluster, config, tensor)
        recompute = "none" if config.recompute == "auto" else config.recompute
        zero = 0 if config.zero == "auto" else config.zero
        n_stages = groups * config.chunks
        microbatches = _microbatches(graph, config, groups, replicas)
        cuts = balanced_cuts(graph, n_stages, _flops_per_cut_byte(cluster, replicas * tensor))
        bounds = [0, *cuts, len(graph.ops)]
        ids = [op.id for op in graph.ops]
        exact: dict[str, str] = {}
        if tensor > 1:
            split = Split(replicas, microbatches, _local(graph, replicas, microbatches), tensor)
            exact = _tensor_parallel(graph, cluster, config, split)
        schedule = config.schedule
        if schedule == "auto":
            schedule = "interleaved_1f1b" if config.chunks > 1 else "1f1b"
        stages = tuple(
            StagePlan(
                first=graph.ops[bounds[s]].id,
                last=graph.ops[bounds[s + 1] - 1].id,
                mesh=_slice(s % groups, replicas, tensor),
                memory=MemoryPolicy(recompute, zero),
                sharding=fold_patterns(exact, ids[bounds[s] : bounds[s + 1]]),
            )
            for s in range(n_stages)
        )
        plan = Plan.of(
            graph,
            cluster,
            stages,
            microbatches=microbatches,
            schedule=schedule,
            placement=[(s % groups, s // groups) for s in range(n_stages)],
            planner=self.name,
        )
        check_plan(plan, graph, cluster)
        return plan


def _slice(group: int, replicas: int, tensor: int) -> MeshSlice:
    size = replicas * tensor
    devices = tuple(range(group * size, (group + 1) * size))
    if tensor == 1:
        return MeshSlice(devices, (replicas,))
    return MeshSlice(devices, (replicas, tensor), (DATA, AXIS_NAMES[0]))


def _local(graph: OpGraph, replicas: int, microbatches: int) -> int:
    share = graph.global_batch // replicas
    if share * replicas != graph.global_batch or share % microbatches:
        raise PlanError(
            f"a global batch of {graph.global_batch} does not divide into {microbatches} "
            f"microbatches × {replicas} replicas: lower train.microbatches or search.replicas"
        )
    return share // microbatches


def _tensor_parallel(
    graph: OpGraph, cluster: Cluster, config: SearchConfig, split: Split
) -> dict[str, str]:
    """Strategies without a cut batch, by the intra-op program (Megatron-LM's, where that pays)."""
    from raypar.search.interop.ways import WayMaker, op_sharding

    units = find_units(graph)
    maker = WayMaker(graph, cluster, load_calibration(cluster), config, units)
    devices = range(split.replicas * split.devices)
    return op_sharding(maker.sharding(split, (split.devices,), ("tensor",), devices), units, graph)


def _flops_per_cut_byte(cluster: Cluster, replicas: int) -> float:
    """FLOP/s of the first device over bytes/s of its link to the next stage's."""
    if cluster.n_devices <= replicas:
        return FLOPS_PER_CUT_BYTE
    rate = cluster.node_of(0).device.peak("float32")
    return rate / cluster.link(0, replicas).bandwidth


def _shape(graph: OpGraph, cluster: Cluster, config: SearchConfig, tensor: int) -> tuple[int, int]:
    """(rank groups, replicas)."""
    if tensor < 1 or tensor > cluster.n_devices:
        raise PlanError(
            f"search.tensor is {tensor}; the cluster has {cluster.n_devices} devices: take 1 to "
            f"{cluster.n_devices}"
        )
    devices = cluster.n_devices // tensor
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
            f"{groups} rank groups × {replicas} replicas × {tensor} devices for sharded ops need "
            f"{groups * replicas * tensor} devices, the cluster has {cluster.n_devices}; lower "
            "search.stages, search.replicas or search.tensor, or set search.chunks "
            f"to {math.ceil(groups * chunks * replicas / devices)}"
        )
    return groups, replicas


def _most_replicas(graph: OpGraph, devices: int) -> int:
    limit = min(devices, graph.max_replicas)
    return max(d for d in range(1, limit + 1) if graph.global_batch % d == 0)


def _microbatches(graph: OpGraph, config: SearchConfig, groups: int, replicas: int) -> int:
    if config.microbatches != "auto":
        if config.microbatches < 1:
            raise PlanError(f"train.microbatches is {config.microbatches}; it is at least 1")
        return config.microbatches
    if graph.feels_microbatches:
        return 1  # M belongs to such a model's training recipe: only the user raises it
    wanted = 1 if groups == 1 else 4 * groups
    per_replica = max(1, graph.global_batch // replicas)
    return max(m for m in range(1, min(wanted, per_replica) + 1) if per_replica % m == 0)
