"""Every rank group's instruction list, with the collectives of its programs beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raypar._plan_text import span
from raypar.lowered import LoweredPlan
from raypar.plan import Plan
from raypar.report._stages import collective_words, graph_collectives
from raypar.report._words import paragraph
from raypar.schedules.instructions import Instruction, Kind
from raypar.search.cost.base import Collective, StageCost

_Uses = Callable[[Instruction], Sequence[Collective]]


def instruction_lists(
    plan: Plan, lowered: LoweredPlan, costs: Sequence[StageCost] | None = None
) -> str:
    """One line for every instruction that a rank group's ranks execute, in order.

    Args:
        plan: The plan.
        lowered: The plan, lowered: its lists are what runs.
        costs: Cost of every stage: with them gradient sums (``SYNC``) and the gathering of
            parameters (``OPTIMIZER``) are told too, and what belongs to which half of a backward.
    """
    blocks = []
    for group, program in enumerate(lowered.lists):
        own = [s for s, (g, _) in enumerate(plan.schedule.placement) if g == group]
        uses = _by_graph(lowered) if costs is None else _by_cost(lowered, costs, own)
        devices = span(plan.stages[own[0]].mesh.devices)
        lines = [f"rank group {group}, devices {devices}, stages {span(own)}:"]
        width = max((len(str(now)) for now in program if uses(now)), default=0)
        for now in program:
            found = collective_words(uses(now))
            lines += paragraph(f"  {str(now).ljust(width)}  ", found, ", ")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _by_graph(lowered: LoweredPlan) -> _Uses:
    """By the conversions that stand in the local graphs."""
    known = [graph_collectives(stage.graph) for stage in lowered.stages]

    def uses(now: Instruction) -> Sequence[Collective]:
        if now.stage is None:
            return ()
        forward, backward = known[now.stage]
        if now.kind is Kind.FORWARD:
            return forward
        return backward if now.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) else ()

    return uses


def _by_cost(lowered: LoweredPlan, costs: Sequence[StageCost], own: Sequence[int]) -> _Uses:
    """By the programs themselves, forward, backward and halves, of the stages `own`."""

    def uses(now: Instruction) -> Sequence[Collective]:
        if now.kind is Kind.OPTIMIZER:
            return [c for s in own for c in costs[s].gather]
        if now.stage is None:
            return ()
        cost, splits = costs[now.stage], lowered.io.splits[now.stage]
        if now.kind is Kind.FORWARD:
            return cost.forward_comm
        if now.kind is Kind.BACKWARD or (now.kind is Kind.BACKWARD_INPUT and not splits):
            return cost.backward_comm
        if now.kind is Kind.BACKWARD_INPUT:
            return cost.backward_input_comm
        if now.kind is Kind.BACKWARD_WEIGHT and splits:
            return cost.backward_weight_comm
        return cost.sync if now.kind is Kind.GRAD_SYNC else ()

    return uses
