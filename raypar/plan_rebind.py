"""Carries a plan over to another capture of the model."""

from __future__ import annotations

import dataclasses
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
    """The sharding of a stage that now has the ops `ids`.

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
    return fold_patterns(exact, ids)
