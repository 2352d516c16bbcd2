"""`explain`: a plan in words and one table."""

from __future__ import annotations

from raypar._plan_text import Column, graph_notes, plan_columns, plan_lines, table
from raypar.fit import check_plan, stage_ranges
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.schedules.timing import Durations, ideal_timeline

_SHOWN = 5


def explain(plan: Plan, graph: OpGraph | None = None, cluster: Cluster | None = None) -> str:
    """Says what a plan does.

    Args:
        plan: The plan.
        graph: The graph it is for: adds work, parameters and traffic of every stage, the idle time
            that the schedule itself costs, and what keeps the model from being split further.
        cluster: The cluster it is for.

    Returns:
        Several lines of text.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
    """
    check_plan(plan, graph, cluster)
    lines = plan_lines(plan)
    if cluster is not None:
        lines.append(f"cluster {cluster.name}: {cluster.describe()}")
    columns = plan_columns(plan)
    notes: list[str] = []
    if graph is not None:
        sliced = lower_plan(graph, plan)
        columns += _columns(plan, graph, sliced)
        lines.append(_idle(plan, graph, sliced))
        notes = _notes(graph, sliced)
    return "\n".join([*lines, "", *table(columns), *([""] if notes else []), *notes])


def _work(plan: Plan, graph: OpGraph) -> list[int]:
    """Forward FLOPs of every stage for one global batch."""
    return [
        sum(op.flops for op in graph.ops[first:end]) for first, end in stage_ranges(plan, graph)
    ]


def _columns(plan: Plan, graph: OpGraph, sliced: LoweredPlan) -> list[Column]:
    work = _work(plan, graph)
    total = max(sum(work), 1)
    held = [[p for p in s.keys("param:") if p in graph.params] for s in sliced.stages]
    sizes = [sum(_elements(graph.params[p][0]) for p in names) for names in held]
    sent = [sum(v.nbytes for v in sliced.values if v.source == s.index) for s in sliced.stages]
    return [
        ("forward work", [f"{100 * w / total:.0f} %" for w in work]),
        ("parameters", [_short(size, 1000, ("", " k", " M", " G")) for size in sizes]),
        ("sends per microbatch", [_short(n, 1024, (" B", " KiB", " MiB", " GiB")) for n in sent]),
    ]


def _idle(plan: Plan, graph: OpGraph, sliced: LoweredPlan) -> str:
    """Idle share of the schedule where time is work: forward F, input and weight halves F each."""
    forward = tuple(float(max(w, 1)) for w in _work(plan, graph))
    again = tuple(
        f * (2 if stage.memory.recompute == "full" else 1)
        for f, stage in zip(forward, plan.stages, strict=True)
    )
    durations = Durations(forward, again, forward).fused(sliced.io.splits)
    timeline = ideal_timeline(sliced.lists, durations)
    idle = sum(timeline.bubble) / (timeline.makespan * len(sliced.lists))
    return (
        f"idle {100 * idle:.0f} % of device time (if time went with work and transfers were free): "
        "pipeline fill and drain, and stages of unequal work"
    )


def _notes(graph: OpGraph, sliced: LoweredPlan) -> list[str]:
    notes = graph_notes(graph)
    holders: dict[str, list[int]] = {}
    for stage in sliced.stages:
        for name in stage.keys("param:"):
            holders.setdefault(name, []).append(stage.index)
    for name, stages in holders.items():
        if len(stages) > 1:
            notes.append(
                f"{name} is used by stages {', '.join(map(str, stages))}: each holds a copy, "
                "their gradients are summed"
            )
    skips = [v for v in sliced.values if v.targets[-1] > v.source + 1]
    for value in skips[:_SHOWN]:
        targets = ", ".join(map(str, value.targets))
        notes.append(f"{value.id} goes from stage {value.source} to {targets}")
    if len(skips) > _SHOWN:
        notes.append(f"and {len(skips) - _SHOWN} more values skip a stage")
    return notes


def _elements(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _short(number: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < base:
            return f"{number:.3g}{unit}" if number < 1000 else f"{number:.0f}{unit}"
        number /= base
    return f"{number:.3g}{units[-1]}"
