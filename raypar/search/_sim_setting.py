"""From a lowered plan to what the simulator plays: costs, and what moves between meshes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import fx

from raypar.comm.reshard import ALIKE, Layout, ReshardPlan, reshard_plan
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MeshSlice, Plan
from raypar.programs.slicing import ValueEdge
from raypar.search._sim_input import Moved, Setting
from raypar.search.cost import analytic, profiled
from raypar.search.cost.base import CostModel, StageCode, StageCost, get_cost_model, stage_code
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.params import ParamCost, param_cost

COST_MODELS = (analytic.AnalyticCost.name, profiled.ProfiledCost.name)
"""Cost models that come with raypar; importing them makes their names known."""

CPU_OVERHEAD_S = 70e-6
"""Seconds that the interpreter spends around one program on a CPU rank: arguments, bookkeeping,
the watch for infinities; measured with stages of a few tiny ops. On a GPU it is hidden, since
programs are queued ahead."""


def setting_of(
    graph: OpGraph,
    plan: Plan,
    lowered: LoweredPlan,
    cluster: Cluster,
    calibration: Calibration,
    cost: str | CostModel,
    cores: int | None,
    optimizer_states: int,
) -> Setting:
    """What `simulate` plays.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
        ConfigError: There is no such cost model.
    """
    check_plan(plan, graph, cluster)
    groups = lowered.io.rank_of
    meshes = tuple(plan.stages[groups.index(group)].mesh for group in range(max(groups) + 1))
    machines = [machine_of(cluster, mesh, calibration) for mesh in meshes]
    model = get_cost_model(cost).for_cluster(cluster) if isinstance(cost, str) else cost
    codes = [stage_code(lowered, plan, s) for s in range(len(lowered.stages))]
    costs = [
        model.stage_cost(code, machines[groups[s]], optimizer_states=optimizer_states)
        for s, code in enumerate(codes)
    ]
    for stage, code in _repeated(codes, groups).items():
        twice = param_cost(code)
        costs[stage] = _without(
            costs[stage], twice, optimizer_states * twice.state_bytes, machines[groups[stage]]
        )
    unequal: dict[tuple[int, int], StageCost] = {}
    for stage, code in enumerate(codes):
        mesh = meshes[groups[stage]]
        if mesh.replicas > 1 and len(machines[groups[stage]].kinds) > 1:
            for replica in range(mesh.replicas):
                own = machine_of(cluster, _one_replica(mesh, replica), calibration)
                found = model.stage_cost(code, own, optimizer_states=optimizer_states)
                unequal[stage, replica] = found
    return Setting(
        io=lowered.io,
        meshes=meshes,
        costs=tuple(costs),
        cluster=cluster,
        calibration=calibration,
        moves=_Moves(lowered, meshes),
        microbatches=plan.microbatches,
        cores=cores,
        tied=_tied(graph, lowered),
        replica_costs=unequal,
        local_bytes=_local_bytes(lowered, meshes),
        globals_s=_globals(lowered, plan, machines),
        overhead_s=0.0 if any(machine.is_gpu for machine in machines) else CPU_OVERHEAD_S,
    )


def _repeated(codes: Sequence[StageCode], groups: Sequence[int]) -> dict[int, StageCode]:
    """Stage → what it holds of parameters that an earlier stage of its rank group holds too.

    A rank keeps one copy of each, with one gradient and one optimizer state.
    """
    known: dict[int, set[str]] = {}
    found = {}
    for stage, (code, group) in enumerate(zip(codes, groups, strict=True)):
        own = known.setdefault(group, set())
        again = fx.Graph()
        for node in code.graph.find_nodes(op="placeholder"):
            key = str(node.meta["id"])
            if key in own:
                again.placeholder(node.name).meta = dict(node.meta)
            elif key.startswith("param:"):
                own.add(key)
        if len(again.nodes):
            found[stage] = replace(code, graph=again)
    return found


def _without(
    cost: StageCost, twice: ParamCost, state_bytes: int, machine: MeshMachine
) -> StageCost:
    step_s = machine.optimizer_s(twice.optimized_bytes, twice.optimized)
    return replace(
        cost,
        param_bytes=cost.param_bytes - twice.param_bytes,
        gradient_bytes=cost.gradient_bytes - twice.gradient_bytes,
        optimizer_bytes=cost.optimizer_bytes - state_bytes,
        optimizer_s=max(0.0, cost.optimizer_s - step_s),
    )


def _one_replica(mesh: MeshSlice, replica: int) -> MeshSlice:
    size = len(mesh.devices) // mesh.replicas
    own = mesh.devices[replica * size : (replica + 1) * size]
    return MeshSlice(own, (1, *(n for _, n in mesh.inner)), mesh.axes)


class _Moves:
    """What moves for an edge between two rank groups, within one replica."""

    def __init__(self, lowered: LoweredPlan, meshes: tuple[MeshSlice, ...]) -> None:
        self._values: Mapping[str, ValueEdge] = {v.id: v for v in lowered.values}
        self._specs = lowered.edge_specs
        self._costs = lowered.costs
        self._sizes = [tuple(n for _, n in mesh.inner) for mesh in meshes]
        self._home = {v.id: lowered.io.rank_of[v.source] for v in lowered.values}
        self._cached = lru_cache(maxsize=None)(self._find)

    def __call__(self, edge: str, source: int, target: int) -> Moved:
        return self._cached(edge, source, target)

    def _find(self, edge: str, source: int, target: int) -> Moved:
        value = self._values[edge]
        first = math.prod(self._sizes[source])
        # Which spec a gradient has is that of the value it belongs to.
        ends = (
            Layout(self._specs[edge, source].value(), self._sizes[source]),
            Layout(self._specs[edge, target].value(), self._sizes[target], first),
        )
        itemsize = max(1, value.nbytes // max(1, math.prod(value.shape)))
        costs = self._costs.get((source, target), ALIKE)
        moved = reshard_plan(value.shape, itemsize, *ends, costs)
        tiles = tuple(
            (s, t - first, itemsize * sum(tile.numel for tile in parts))
            for (s, t), parts in moved.messages.items()
        )
        groups, shared = _local_collective(moved, first, itemsize)
        return Moved(tiles, groups, shared)


def _local_collective(
    moved: ReshardPlan, first: int, itemsize: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The groups of target positions that share what came, and bytes of what each then holds."""
    groups = tuple(tuple(rank - first for rank in group) for group in moved.replicas)
    local = moved.target.spec.local_shape(moved.shape, moved.target.mesh)
    return groups, itemsize * math.prod(local) if groups else 0


def _local_bytes(lowered: LoweredPlan, meshes: tuple[MeshSlice, ...]) -> dict[tuple[str, int], int]:
    values = {v.id: v for v in lowered.values}
    found = {}
    for (edge, group), spec in lowered.edge_specs.items():
        if edge not in values:
            raise PlanError(f"the lowered plan speaks of edge {edge!r}, which no stage makes")
        sizes = tuple(n for _, n in meshes[group].inner)
        found[edge, group] = values[edge].nbytes // spec.parts(sizes)
    return found


def _tied(graph: OpGraph, lowered: LoweredPlan) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Parameters that several rank groups hold: those with equal owners are summed together."""
    holders: dict[str, list[int]] = {}
    for stage in lowered.stages:
        for name in stage.keys("param:"):
            if f"param:{name}" in lowered.flow:
                holders.setdefault(name, []).append(stage.index)
    found: dict[tuple[int, ...], tuple[set[int], int]] = {}
    for name, stages in holders.items():
        groups = tuple(sorted({lowered.io.rank_of[s] for s in stages}))
        if len(groups) < 2:
            continue
        shape, dtype = graph.params[name][0], graph.params[name][1]
        nbytes = math.prod(shape) * getattr(torch, dtype).itemsize
        known, total = found.get(groups, (set(), 0))
        found[groups] = (known | set(stages), total + nbytes)
    return tuple((tuple(sorted(stages)), nbytes) for stages, nbytes in found.values())


def _globals(lowered: LoweredPlan, plan: Plan, machines: list[MeshMachine]) -> dict[int, float]:
    """Stage → seconds to count the whole batch: its small ops once per microbatch, and the sums."""
    found = {}
    for stage in lowered.stages:
        if stage.globals_graph is None:
            continue
        machine = machines[lowered.io.rank_of[stage.index]]
        ops = sum(node.op == "call_function" for node in stage.globals_graph.nodes)
        seconds = plan.microbatches * ops * machine.overhead_s
        if plan.replicas > 1:
            seconds += len(stage.globals) * machine.collective_s(DATA, "all_reduce", 8)
        found[stage.index] = seconds
    return found
