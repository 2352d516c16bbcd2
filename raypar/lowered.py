"""Plan → what its ranks run: local stage graphs, how values lie at every border, and the lists.

Simulators and stage actors both start here, so that what is judged is what is run.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from raypar.comm.reshard import LinkCosts
from raypar.fit import check_plan, stage_ranges
from raypar.graph.forward import ForwardGraph
from raypar.graph.opgraph import OpGraph
from raypar.graph.replay import gradient_flow
from raypar.graph.turns import in_turn
from raypar.mesh.devices import DEVICES
from raypar.plan import Plan
from raypar.plan_rebind import forward_ranges, forward_shardings
from raypar.programs.slicing import StageGraph, ValueEdge, slice_stages
from raypar.schedules.check import check_lists
from raypar.schedules.checked import checked_lists
from raypar.schedules.compile import compile_schedule
from raypar.schedules.forward_only import ForwardOnly
from raypar.schedules.instructions import Instruction
from raypar.schedules.io import Edge, StageIO
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.layout import ParamLayout, layout_of
from raypar.sharding.lower import (
    Gathered,
    Lowered,
    arrival_spec,
    assign,
    held_spec,
    lower,
    readings,
)
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import RG, ShardingSpec


@dataclass
class LoweredPlan:
    """A plan's stages as ranks run them.

    Attributes:
        stages: Stage graphs of local shape.
        whole: The same stages before lowering, at the size of one microbatch on one replica.
        lowered: Per stage how received and sent values lie.
        values: What crosses between stages, with whole shapes.
        flow: Ids of values that receive a gradient.
        io: The stages as a schedule sees them.
        lists: One checked instruction list per rank group.
        layouts: Per rank group how its parameters lie.
        edge_specs: (edge id, rank group) → how the value lies there, over the inner axes.
        chosen: Per stage the strategy of every op.
        costs: (sending, receiving) rank group → what messages between them cost, for values that
            lie differently on both.
    """

    stages: list[StageGraph]
    whole: list[StageGraph]
    lowered: list[Lowered]
    values: list[ValueEdge]
    flow: frozenset[str]
    io: StageIO
    lists: list[list[Instruction]]
    layouts: list[dict[str, ParamLayout]]
    edge_specs: dict[tuple[str, int], ShardingSpec]
    chosen: list[dict[fx.Node, Strategy]] = field(default_factory=list)
    costs: dict[tuple[int, int], LinkCosts] = field(default_factory=dict)


@in_turn
def lower_plan(graph: OpGraph, plan: Plan) -> LoweredPlan:
    """Cuts the graph as the plan says, lowers every stage, and compiles the schedule.

    Raises:
        PlanError: The plan does not fit the graph.
        ScheduleError: The instruction lists do not pass the checker.
    """
    check_plan(plan, graph)
    clean = graph.local(plan.local_batch)
    annotate_blocks(clean.graph)  # before cutting: a block's readers may be in another stage
    whole, values = slice_stages(
        clean, stage_ranges(plan, graph), graph.cloneable, graph.analysis.globals
    )
    flow = _flow(graph)
    edges = tuple(Edge(v.id, v.source, v.targets, v.id in flow, v.nbytes) for v in values)
    splits = tuple(
        any(e in flow for e in s.keys("edge:"))
        and any(f"param:{p}" in flow for p in s.keys("param:"))
        for s in whole
    )
    groups = tuple(group for group, _ in plan.schedule.placement)
    io = StageIO(len(whole), groups, edges, splits)
    lists = checked_lists(plan.schedule.name, io, plan.microbatches)
    chosen = [
        assign(
            s.graph, plan.stages[s.index].sharding, [n for _, n in plan.stages[s.index].mesh.inner]
        )
        for s in whole
    ]
    layouts = [_layouts(graph, plan, whole, chosen, group) for group in range(max(groups) + 1)]
    stages, lowered, specs = _lower_stages(plan, whole, values, chosen, layouts)
    return LoweredPlan(
        stages, whole, lowered, values, flow, io, lists, layouts, specs, chosen, link_costs(plan)
    )


@in_turn
def lower_forward(
    graph: ForwardGraph,
    plan: Plan,
    trained: OpGraph,
    layouts: Sequence[Mapping[str, ParamLayout]],
    parts: tuple[int, int],
) -> LoweredPlan:
    """A graph that evaluates, on the stages and meshes of a plan that trains it.

    Parameters are taken as training holds them; what a rank group reads and does not hold is taken
    whole (`raypar.stages.evaluation` moves it there). The results are `graph.clean.results`, then
    what the loss is a mean over, where there is such a count (`ForwardGraph.count_of_loss`).

    Args:
        graph: The model in eval mode.
        plan: The plan.
        trained: The graph that the plan is for.
        layouts: Per rank group how training holds its parameters.
        parts: How many microbatches its batch is cut into, and over how many replicas each of them.

    Raises:
        ScheduleError: The instruction lists do not pass the checker.
    """
    microbatches, replicas = parts
    local = graph.global_batch // (microbatches * replicas)
    ranges = forward_ranges(plan, trained, graph)
    shardings = forward_shardings(plan, graph, ranges, local)
    clean = graph.local(local)
    annotate_blocks(clean.graph)
    count = graph.count_of_loss()
    counted = [n for n in clean.ops if count is not None and n.meta["id"] == count.meta["id"]]
    whole, values = slice_stages(
        clean, ranges, graph.cloneable, graph.analysis.globals, [*clean.results, *counted]
    )
    edges = tuple(Edge(v.id, v.source, v.targets, False, v.nbytes) for v in values)
    groups = tuple(group for group, _ in plan.schedule.placement)
    io = StageIO(len(whole), groups, edges, (False,) * len(whole))
    lists = compile_schedule(ForwardOnly(), io, microbatches)
    check_lists(lists, io, microbatches, trains=False)
    chosen = [
        assign(s.graph, sharding, [n for _, n in plan.stages[s.index].mesh.inner])
        for s, sharding in zip(whole, shardings, strict=True)
    ]
    taken = [dict(held) for held in layouts]
    for stage in whole:
        axes = plan.stages[stage.index].mesh.named
        for name in stage.keys("param:"):
            spec = ShardingSpec.replicated(len(axes))
            layout = layout_of(graph.params[name][0], spec, axes, 0)
            taken[groups[stage.index]].setdefault(name, layout)
    stages, lowered, specs = _lower_stages(plan, whole, values, chosen, taken)
    return LoweredPlan(
        stages, whole, lowered, values, frozenset(), io, lists, taken, specs, chosen,
        link_costs(plan),
    )  # fmt: skip


def _lower_stages(
    plan: Plan,
    whole: Sequence[StageGraph],
    values: Sequence[ValueEdge],
    chosen: Sequence[Mapping[fx.Node, Strategy]],
    layouts: Sequence[Mapping[str, ParamLayout]],
) -> tuple[list[StageGraph], list[Lowered], dict[tuple[str, int], ShardingSpec]]:
    """The stages of local shape, how values lie at their borders, and how on each rank group."""
    specs = _arrivals(plan, values, whole, chosen)
    lowered = []
    for stage in whole:
        group = plan.schedule.placement[stage.index][0]
        found = _lower_stage(plan, stage, chosen[stage.index], layouts[group], specs, group)
        specs.update({(edge, group): spec for edge, spec in found.departures.items()})
        lowered.append(found)
    stages = [replace(s, graph=low.graph) for s, low in zip(whole, lowered, strict=True)]
    return stages, lowered, specs


def _flow(graph: OpGraph) -> frozenset[str]:
    """Ids of values that receive a gradient: the same at every batch size."""
    if "gradient flow" not in graph.memo:
        trainable = {name: trained for name, (_, _, trained) in graph.params.items()}
        graph.memo["gradient flow"] = gradient_flow(graph.clean, trainable)
    found: frozenset[str] = graph.memo["gradient flow"]
    return found


def link_costs(plan: Plan) -> dict[tuple[int, int], LinkCosts]:
    """What messages between rank groups cost, by the device table.

    It decides how values move that lie differently on both sides; every rank has to decide alike,
    so that it follows from the plan alone.

    Returns:
        (sending, receiving) rank group → costs, for groups that are not on one node; between those
        that are, all links are alike.
    """
    ends = list(itertools.accumulate(plan.cluster))
    nodes = {
        group: {bisect.bisect_right(ends, device) for device in stage.mesh.devices}
        for (group, _), stage in zip(plan.schedule.placement, plan.stages, strict=True)
    }
    kinds = [DEVICES[name] for name in plan.device.split("+") if name in DEVICES]
    if not kinds:
        return {}
    inside = min((kind.inside for kind in kinds), key=lambda link: link.bandwidth)
    across = min((kind.across for kind in kinds), key=lambda link: link.bandwidth)
    costs = LinkCosts(across.latency, 1 / across.bandwidth, inside.latency, 1 / inside.bandwidth)
    return {
        (a, b): costs for a, b in itertools.permutations(nodes, 2) if len(nodes[a] | nodes[b]) > 1
    }


def with_schedule(lowered: LoweredPlan, name: str, microbatches: int) -> LoweredPlan:
    """The same stages with the lists of another schedule.

    Args:
        lowered: A lowered plan.
        name: The schedule; it has to take the plan's placement.
        microbatches: M of the plan.

    Raises:
        ScheduleError: The schedule does not take the placement, or its lists fail the checker.
    """
    return replace(lowered, lists=checked_lists(name, lowered.io, microbatches))


def _layouts(
    graph: OpGraph,
    plan: Plan,
    stages: Sequence[StageGraph],
    chosen: Sequence[Mapping[fx.Node, Strategy]],
    group: int,
) -> dict[str, ParamLayout]:
    """How the parameters of one rank group lie: decided over all of its stages."""
    own = [s for s in stages if plan.schedule.placement[s.index][0] == group]
    mesh = plan.stages[own[0].index].mesh
    wanted: dict[str, set[ShardingSpec]] = {}
    zero: dict[str, int] = {}
    for stage in own:
        for key, specs in readings(stage.graph, chosen[stage.index]).items():
            if key.startswith("param:"):
                wanted.setdefault(key[6:], set()).update(specs)
        for name in stage.keys("param:"):
            level = plan.stages[stage.index].memory.zero
            zero[name] = min(level, zero.get(name, level))
    data = (RG,) * (len(mesh.named) - len(mesh.inner))
    found = {}
    for name, level in zero.items():
        held = ShardingSpec((*data, *held_spec(wanted.get(name, set()), len(mesh.inner))))
        found[name] = layout_of(graph.params[name][0], held, mesh.named, level)
    return {name: found[name] for name in graph.params if name in found}


def _arrivals(
    plan: Plan,
    values: Sequence[ValueEdge],
    stages: Sequence[StageGraph],
    chosen: Sequence[Mapping[fx.Node, Strategy]],
) -> dict[tuple[str, int], ShardingSpec]:
    """How values lie on the rank groups that receive them: decided over all readers there."""
    reads = [readings(s.graph, chosen[s.index]) for s in stages]
    groups = [group for group, _ in plan.schedule.placement]
    n_axes = {g: len(s.mesh.inner) for g, s in zip(groups, plan.stages, strict=True)}
    wanted: dict[tuple[str, int], set[ShardingSpec]] = {}
    for value in values:
        for target in value.targets:
            specs = reads[target].get(f"edge:{value.id}", set())
            wanted.setdefault((value.id, groups[target]), set()).update(specs)
    return {key: arrival_spec(specs, n_axes[key[1]]) for key, specs in wanted.items()}


def _lower_stage(
    plan: Plan,
    stage: StageGraph,
    chosen: Mapping[fx.Node, Strategy],
    layouts: Mapping[str, ParamLayout],
    specs: Mapping[tuple[str, int], ShardingSpec],
    group: int,
) -> Lowered:
    mesh = plan.stages[stage.index].mesh
    first = len(mesh.named) - len(mesh.inner)
    return lower(
        stage.graph,
        chosen,
        mesh.inner,
        held={name: ShardingSpec(x.held[first:]) for name, x in layouts.items()},
        gathered={
            name: Gathered(x.stored, x.held, mesh.named)
            for name, x in layouts.items()
            if x.in_program
        },
        arriving={edge: spec for (edge, g), spec in specs.items() if g == group},
        departing=stage.edges_out,
    )
