"""Carries a plan over to another capture of the model: one that trains, or one that evaluates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import fx

from raypar.errors import PlanError
from raypar.graph.balance import balanced_cuts
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.strategies import fold_patterns, pattern_of, strategies


def rebind(plan: Plan, graph: OpGraph) -> Plan:
    """See `Plan.rebind`."""
    parts = plan.microbatches * plan.replicas
    if graph.global_batch % parts:
        raise PlanError(
            f"the plan cuts a batch into {plan.microbatches} microbatches × {plan.replicas} "
            f"replicas, which does not divide the graph's global batch of {graph.global_batch}; "
            "use a batch that is a multiple, or plan again"
        )
    if plan.replicas > graph.max_replicas:
        op, reason = graph.analysis.blockers[0]
        raise PlanError(
            f"the plan has {plan.replicas} replicas, but in this graph samples meet at {op!r} "
            f"({reason}); plan again with replicas=1"
        )
    ends = _mapped_ends(plan, graph)
    if ends is None:
        ends = [*balanced_cuts(graph, len(plan.stages)), len(graph.ops)]
    starts = [0, *ends[:-1]]
    stages = tuple(
        dataclasses.replace(
            stage, first=graph.ops[first].id, last=graph.ops[end - 1].id, predicted={}
        )
        for stage, first, end in zip(plan.stages, starts, ends, strict=True)
    )
    if any(stage.sharding for stage in plan.stages):
        nodes = _annotated(graph, graph.global_batch // parts)
        stages = tuple(
            dataclasses.replace(
                stage, sharding=_carried(plan, s, [op.id for op in graph.ops[first:end]], nodes)
            )
            for s, (stage, first, end) in enumerate(zip(stages, starts, ends, strict=True))
        )
    return dataclasses.replace(
        plan,
        graph_hash=graph.hash,
        params_hash=graph.params_hash,
        global_batch=graph.global_batch,
        batch_dims=graph.batch_dims,
        stages=stages,
        predicted={},
        alternatives={},
    )


_FAR = 1000  # a tensor that has to be moved weighs like so many ops on other stages


def forward_ranges(plan: Plan, trained: OpGraph, graph: OpGraph) -> list[tuple[int, int]]:
    """Op positions ``[first, end)`` of every stage for a graph that evaluates.

    In eval mode some ops are gone (dropout) and some are others (batch norm), while parameters stay
    where training holds them. Of all ways to cut, this takes one with the fewest ops that read a
    parameter or buffer which their rank group does not hold, and then with the fewest ops on
    another stage than in training. A stage may get no ops at all.

    Args:
        plan: The plan that trains.
        trained: Its graph.
        graph: The same model in eval mode.
    """
    stage_of = _stages_by_id(plan, trained)
    groups = [group for group, _ in plan.schedule.placement]
    holders: dict[str, set[int]] = {}
    for op in trained.ops:
        for key in op.inputs:
            if key.startswith(("param:", "buffer:")):
                holders.setdefault(key, set()).add(groups[stage_of[op.id]])
    places = [0, *graph.cuts, len(graph.ops)]
    # best[k]: the least cost of the ops before places[k], on the stages so far.
    best = [0.0, *[math.inf] * (len(places) - 1)]
    choices: list[list[int]] = []
    for stage, group in enumerate(groups):
        sums = [0.0]
        for op in graph.ops:
            away = [k for k in op.inputs if k in holders and group not in holders[k]]
            moved = stage_of.get(op.id, stage) != stage
            sums.append(sums[-1] + moved + _FAR * len(away))
        reached, chosen = [], []
        start = 0  # the best place where this stage can begin, of those up to the present one
        for k, place in enumerate(places):
            if best[k] - sums[place] < best[start] - sums[places[start]]:
                start = k
            reached.append(best[start] + sums[place] - sums[places[start]])
            chosen.append(start)
        best = reached
        choices.append(chosen)
    ranges, end = [], len(places) - 1
    for chosen in reversed(choices):
        ranges.append((places[chosen[end]], places[end]))
        end = chosen[end]
    return ranges[::-1]


def _stages_by_id(plan: Plan, graph: OpGraph) -> dict[str, int]:
    """Op id → its stage."""
    found: dict[str, int] = {}
    for s, stage in enumerate(plan.stages):
        for op in graph.ops[graph.index[stage.first] : graph.index[stage.last] + 1]:
            found[op.id] = s
    return found


def forward_shardings(
    plan: Plan, graph: OpGraph, ranges: Sequence[tuple[int, int]], local_batch: int
) -> list[dict[str, str]]:
    """How the ops of a graph that evaluates run on each stage's mesh: op id → strategy.

    An op runs as the op of its id trains, where that divides; else it is computed whole.

    Args:
        plan: The plan that trains.
        graph: The model in eval mode.
        ranges: From `forward_ranges`.
        local_batch: Samples of a microbatch on one replica.
    """
    if not any(stage.sharding for stage in plan.stages):
        return [{} for _ in plan.stages]
    nodes = _annotated(graph, local_batch)
    return [
        _strategies(plan, s, [op.id for op in graph.ops[first:end]], nodes)
        for s, (first, end) in enumerate(ranges)
    ]


def _mapped_ends(plan: Plan, graph: OpGraph) -> list[int] | None:
    """Where the stages end in the new graph, or None where one end is gone."""
    cuts = set(graph.cuts)
    ends: list[int] = []
    for stage in plan.stages[:-1]:
        place = graph.index.get(stage.last)
        if place is None or place + 1 not in cuts or (ends and place + 1 <= ends[-1]):
            return None
        ends.append(place + 1)
    return [*ends, len(graph.ops)]


def _annotated(graph: OpGraph, local_batch: int) -> dict[str, fx.Node]:
    """Op id → the call at the size of one microbatch on one replica, ready for rules."""
    clean = graph.local(local_batch)
    annotate_blocks(clean.graph)
    return {node.meta["id"]: node for node in clean.ops}


def _carried(
    plan: Plan, index: int, ids: Sequence[str], nodes: Mapping[str, fx.Node]
) -> dict[str, str]:
    """The sharding of a stage that now has the ops `ids`, in as few entries as possible."""
    return fold_patterns(_strategies(plan, index, ids, nodes), ids)


def _strategies(
    plan: Plan, index: int, ids: Sequence[str], nodes: Mapping[str, fx.Node]
) -> dict[str, str]:
    """The strategy of every op of a stage that now has the ops `ids`.

    An op does as it did, also where it was in another stage on a mesh of the same axes. What no
    longer divides, or has no such op to follow, is left to be computed whole.
    """
    mesh = plan.stages[index].mesh
    sizes = [size for _, size in mesh.inner]
    like = [plan.stages[index], *(s for s in plan.stages if s.mesh.inner == mesh.inner)]
    exact: dict[str, str] = {}
    for key in ids:
        texts = (s.sharding.get(key) or s.sharding.get(pattern_of(key)) for s in like)
        text = next((t for t in texts if t), None)
        if text and any(str(known) == text for known in strategies(nodes[key], sizes)):
            exact[key] = text
    return exact
