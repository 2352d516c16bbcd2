"""A plan as text: what it says by itself, without graph or cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raypar.graph.opgraph import OpGraph
    from raypar.plan import Plan

_SHOWN = 5
Column = tuple[str, Sequence[str]]


def plan_lines(plan: Plan) -> list[str]:
    """The facts of the whole plan, one a line."""
    groups = len({group for group, _ in plan.schedule.placement})
    per_node = " + ".join(map(str, plan.cluster))
    lines = [
        f"plan by {plan.planner}: {_count(len(plan.stages), 'stage')} on "
        f"{_count(groups, 'rank group')} × {_count(plan.replicas, 'replica')} = "
        f"{_count(len(plan.devices), 'device')} of {per_node} ({plan.device})",
        f"batch {plan.global_batch} = {_count(plan.microbatches, 'microbatch')} × "
        f"{_count(plan.replicas, 'replica')} × {_count(plan.local_batch, 'sample')}",
        f"schedule {plan.schedule.name}, torch {plan.torch}, "
        f"graph {plan.graph_hash[:12]}, parameters {plan.params_hash[:12]}",
    ]
    if plan.predicted:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in plan.predicted.items())
        lines.append(f"predicted: {figures}")
    return lines


def plan_columns(plan: Plan) -> list[Column]:
    """The table of stages, column by column."""
    stages = plan.stages
    columns: list[Column] = [
        ("stage", [str(s) for s in range(len(stages))]),
        ("first op", [stage.first for stage in stages]),
        ("last op", [stage.last for stage in stages]),
        ("devices", [",".join(map(str, stage.mesh.devices)) for stage in stages]),
    ]
    if any(chunk for _, chunk in plan.schedule.placement):
        columns.append(("chunk", [str(chunk) for _, chunk in plan.schedule.placement]))
    columns.append(("recompute", [stage.memory.recompute for stage in stages]))
    for key in dict.fromkeys(k for stage in stages for k in stage.predicted):
        cells = [f"{s.predicted[key]:.4g}" if key in s.predicted else "" for s in stages]
        columns.append((key, cells))
    return columns


def graph_notes(graph: OpGraph) -> list[str]:
    """What keeps a model from being split further, one a line."""
    notes = []
    blockers = graph.analysis.blockers
    if graph.max_replicas == 1 and blockers:
        notes.append("one replica only, since these ops mix samples or have no batch rule:")
        notes += [f"  {op}: {reason}" for op, reason in blockers[:_SHOWN]]
        if len(blockers) > _SHOWN:
            notes.append(f"  and {len(blockers) - _SHOWN} more")
    if graph.feels_microbatches:
        notes.append(
            "the result depends on the number of microbatches: it belongs to the training recipe, "
            "and no planner changes it"
        )
    return notes


def table(columns: Sequence[Column]) -> list[str]:
    """Columns side by side; cells that are numbers stand to the right."""
    texts = []
    for title, cells in columns:
        width = max(len(title), *(len(cell) for cell in cells))
        right = all(cell[:1].isdigit() or not cell for cell in cells)
        texts.append([c.rjust(width) if right else c.ljust(width) for c in (title, *cells)])
    return ["  ".join(row).rstrip() for row in zip(*texts, strict=True)]


def _count(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
