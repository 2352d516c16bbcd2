"""`explain`: what a plan does, what it costs, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raypar._plan_text import (
    Column,
    alternative_lines,
    graph_notes,
    joined,
    plan_columns,
    plan_lines,
    size,
    table,
)
from raypar.fit import check_plan, stage_ranges
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report._ranks import rank_lines, step_lines
from raypar.report._stages import stage_lines
from raypar.report._words import paragraph
from raypar.report.lists import instruction_lists
from raypar.schedules.timing import Durations, ideal_timeline
from raypar.search.cost.base import StageCost
from raypar.search.need import need_of
from raypar.search.simulate import Simulation, simulate
from raypar.sharding.coverage import coverage

_SHOWN = 5
_SAME = 0.005  # of a step: what is told with three digits reads alike
_MANY = 24  # stages: of more, the table shows the first and the last ones


def explain(
    plan: Plan,
    graph: OpGraph | None = None,
    cluster: Cluster | None = None,
    *,
    calibration: Calibration | None = None,
    cores: int | None = None,
    optimizer_states: int = 2,
    lists: bool = False,
) -> str:
    """Says what a plan does, what it costs, and why.

    Args:
        plan: The plan.
        graph: The graph it is for: adds work, parameters and traffic of every stage, how its ops
            are sharded, the collectives of its programs, and what keeps the model from being split
            further.
        cluster: The cluster it is for: with the graph, a step is simulated on it, which tells its
            time, the critical path, and what ranks do and hold.
        calibration: What the cluster reaches; default: what was measured on it, else the device
            table.
        cores: As in `raypar.search.simulate.simulate`.
        optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).
        lists: With every rank group's instruction list, and the collectives of its programs beside
            them; needs the graph.

    Returns:
        Lines of at most 100 columns.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
    """
    return explanation(
        plan,
        graph,
        cluster,
        calibration=calibration,
        cores=cores,
        optimizer_states=optimizer_states,
        lists=lists,
    ).text


@dataclass(frozen=True)
class Explanation:
    """What `explain` says, and what it says at its end.

    Attributes:
        text: All of it.
        lacking: How much memory a rank lacks and what binds, in parts; empty where the plan fits
            the devices' memory, or no step was simulated.
    """

    text: str
    lacking: tuple[str, ...] = ()


def explanation(
    plan: Plan,
    graph: OpGraph | None = None,
    cluster: Cluster | None = None,
    *,
    calibration: Calibration | None = None,
    cores: int | None = None,
    optimizer_states: int = 2,
    lists: bool = False,
) -> Explanation:
    """`explain`, and whether the plan fits; see there.

    Raises:
        PlanError: The plan does not fit the graph or the cluster.
    """
    check_plan(plan, graph, cluster)
    where = [] if cluster is None else [f"cluster {cluster.name}: {cluster.describe()}"]
    if graph is None:
        rows = table(plan_columns(plan))
        return Explanation(joined([plan_lines(plan) + where, rows, alternative_lines(plan)]))
    lowered = lower_plan(graph, plan)
    played: Simulation | None = None
    if cluster is not None:
        played = simulate(
            graph,
            plan,
            cluster,
            calibration=calibration or load_calibration(cluster),
            lowered=lowered,
            cores=cores,
            optimizer_states=optimizer_states,
        )
        lines = [*plan_lines(plan, predicted=_planned(plan, played)), *where, *step_lines(played)]
    else:
        lines = [*plan_lines(plan), *paragraph(_idle(plan, graph, lowered), [])]
    costs: Sequence[StageCost] | None = None if played is None else played.setting.costs
    columns = [
        (title, cells)
        for title, cells in plan_columns(plan, predicted=False)
        if title != "recompute" or set(cells) != {"none"}
    ] + _columns(plan, graph, lowered)
    lacking = () if played is None else _lacking(plan, lowered, played)
    sections = [
        lines,
        _ends(table(columns)),
        [] if played is None else rank_lines(played),
        ["what stages do:", *stage_lines(plan, graph, lowered, costs)],
        _unsplit(plan, graph),
        alternative_lines(plan),
        _notes(graph, lowered),
        instruction_lists(plan, lowered, costs).splitlines() if lists else [],
        # Last, where it is seen: all that stands above is of no use then.
        paragraph("THIS PLAN DOES NOT FIT: ", lacking) if lacking else [],
    ]
    return Explanation(joined(sections), lacking)


def _planned(plan: Plan, played: Simulation) -> str:
    """What the planner's figures are called beside those of a simulation; they may be the same."""
    step = plan.predicted.get("step_s")
    same = step is None or math.isclose(step, played.step_s, rel_tol=_SAME)
    return "" if same else "when it was planned"


def _lacking(plan: Plan, lowered: LoweredPlan, played: Simulation) -> tuple[str, ...]:
    """What binds where a rank needs more memory than there is."""
    need = need_of(plan, lowered, played)
    if need.nbytes <= need.limit:
        return ()
    return (
        f"a rank needs {size(need.nbytes)} of {size(need.limit)}",
        f"what binds is {need.binding}",
        "search.planner: optuna without search.stages, search.replicas and search.tensor finds a "
        "plan that fits, or tells what would",
    )


def _ends(rows: list[str]) -> list[str]:
    """The rows of a long table without its middle."""
    if len(rows) <= _MANY + 1:
        return rows
    half = _MANY // 2
    return [*rows[: half + 1], f"... {len(rows) - 1 - 2 * half} more stages ...", *rows[-half:]]


def _work(plan: Plan, graph: OpGraph) -> list[int]:
    """Forward FLOPs of every stage for one global batch."""
    return [
        sum(op.flops for op in graph.ops[first:end]) for first, end in stage_ranges(plan, graph)
    ]


def _columns(plan: Plan, graph: OpGraph, lowered: LoweredPlan) -> list[Column]:
    work = _work(plan, graph)
    total = max(sum(work), 1)
    held = [[p for p in s.keys("param:") if p in graph.params] for s in lowered.whole]
    counts = [sum(math.prod(graph.params[p][0]) for p in names) for names in held]
    sent = [sum(v.nbytes for v in lowered.values if v.source == s.index) for s in lowered.whole]
    return [
        ("work", [f"{100 * w / total:.0f} %" for w in work]),
        ("parameters", [_count(count) for count in counts]),
        ("sends", [size(n) for n in sent]),
    ]


def _unsplit(plan: Plan, graph: OpGraph) -> list[str]:
    """Ops that no strategy splits, for every size of axis over which the plan shards."""
    sizes = sorted({n for s in plan.stages for _, n in s.mesh.inner if n > 1})
    local = graph.local(plan.local_batch)
    lines = []
    for n in sizes:
        found = coverage(local, n)
        lines += paragraph(f"ops over {n} ranks: {found}", [])
        if found.without_rule:
            lines += paragraph("  no rule for ", found.without_rule, ", ")
    return lines


def _idle(plan: Plan, graph: OpGraph, lowered: LoweredPlan) -> str:
    """Idle share of the schedule where time is work: forward F, input and weight halves F each."""
    forward = tuple(float(max(w, 1)) for w in _work(plan, graph))
    again = tuple(
        f * (2 if stage.memory.recompute == "full" else 1)
        for f, stage in zip(forward, plan.stages, strict=True)
    )
    durations = Durations(forward, again, forward).fused(lowered.io.splits)
    timeline = ideal_timeline(lowered.lists, durations)
    idle = sum(timeline.bubble) / (timeline.makespan * len(lowered.lists))
    return (
        f"idle {100 * idle:.0f} % of device time (if time went with work and transfers were free): "
        "pipeline fill and drain, and stages of unequal work"
    )


def _notes(graph: OpGraph, lowered: LoweredPlan) -> list[str]:
    notes = graph_notes(graph)
    holders: dict[str, list[int]] = {}
    for stage in lowered.stages:
        for name in stage.keys("param:"):
            holders.setdefault(name, []).append(stage.index)
    for name, stages in holders.items():
        if len(stages) > 1:
            notes.append(
                f"{name} is used by stages {', '.join(map(str, stages))}: each holds a copy, "
                "their gradients are summed"
            )
    skips = [v for v in lowered.values if v.targets[-1] > v.source + 1]
    for value in skips[:_SHOWN]:
        targets = ", ".join(map(str, value.targets))
        notes.append(f"{value.id} goes from stage {value.source} to {targets}")
    if len(skips) > _SHOWN:
        notes.append(f"and {len(skips) - _SHOWN} more values skip a stage")
    return notes


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} T"
