"""From the reports of ranks to the figures of a measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.search.measure import Measured, StageSeconds
from raypar.stages.spec import StepReport
from raypar.train._warm_actor import Held
from raypar.train.quiet import Step, figure_of


def measured_of(
    graph: OpGraph,
    plan: Plan,
    steps: Sequence[Step],
    held: Sequence[Held],
    saved: Sequence[int],
    took_s: float,
) -> Measured:
    """The figures of a plan.

    Args:
        graph: The captured model.
        plan: What ran.
        steps: At least one.
        held: What every rank holds from step to step, by rank.
        saved: Most bytes that every rank held between forward and backward, by rank.
        took_s: Seconds of the whole measurement.
    """
    figure = figure_of(steps)
    on_gpu = any(one.peak for one in held)
    return Measured(
        step_s=figure.seconds,
        spread=figure.spread,
        steps=len(figure.steps),
        took_s=took_s,
        # Passes on a GPU are told to the device only; what they took there is not in the reports.
        stages=() if on_gpu else stage_seconds(graph, plan, figure.steps),
        peak_bytes=max(
            one.peak or one.resident + most for one, most in zip(held, saved, strict=True)
        ),
        disturbed=figure.disturbed,
    )


def stage_seconds(graph: OpGraph, plan: Plan, steps: Sequence[Step]) -> tuple[StageSeconds, ...]:
    """Per stage the medians over the steps, on its slowest rank.

    A rank's optimizer updates the parameters of all its stages at once: its time is parted by
    their numbers of elements.
    """
    shares = _optimizer_shares(graph, plan)
    found = []
    for stage in range(len(plan.stages)):
        times = []
        for rank, report in enumerate(steps[0].ranks):
            if stage not in report.passes:
                continue
            own = [step.ranks[rank] for step in steps]
            times.append(
                (
                    statistics.median(r.passes[stage][0] for r in own) / plan.microbatches,
                    statistics.median(r.passes[stage][1] for r in own) / plan.microbatches,
                    statistics.median(_optimizer_s(r) for r in own) * shares[stage],
                )
            )
        slowest = max(times, key=lambda t: t[0] + t[1])
        found.append(StageSeconds(*slowest))
    return tuple(found)


def _optimizer_s(report: StepReport) -> float:
    return report.seconds.get("optimizer", 0.0)


def _optimizer_shares(graph: OpGraph, plan: Plan) -> list[float]:
    """For every stage its share of the trained elements on its rank group."""
    position = {op.id: index for index, op in enumerate(graph.ops)}
    elements = []
    for stage in plan.stages:
        ops = graph.ops[position[stage.first] : position[stage.last] + 1]
        names = {name for op in ops for name in op.params}
        shapes = [graph.params[n][0] for n in names if graph.params[n][2]]
        elements.append(sum(math.prod(shape) for shape in shapes))
    groups = [group for group, _ in plan.schedule.placement]
    totals = [sum(n for n, g in zip(elements, groups, strict=True) if g == own) for own in groups]
    return [n / total if total else 0.0 for n, total in zip(elements, totals, strict=True)]
