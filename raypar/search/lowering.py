"""Plans as a search lowers them: of written graphs (`raypar.graph.even`), each kept for a while.

A planner plays its best plans, and who asked it plays the winner again; neighbours of a plan often
differ from it in the schedule alone. Lowering a large model takes seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from raypar.graph.even import even
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan, with_schedule
from raypar.plan import Plan

_MOST = 16
_KEY = "lowered by a search"


def lowered_for_search(graph: OpGraph, plan: Plan) -> LoweredPlan:
    """The lowered plan; plans that differ in their schedule only are lowered once.

    Raises:
        PlanError: As `raypar.lowered.lower_plan`.
        ScheduleError: As it.
    """
    known: OrderedDict[str, LoweredPlan] = graph.memo.setdefault(_KEY, OrderedDict())
    stages = tuple(replace(stage, predicted={}) for stage in plan.stages)
    schedule = replace(plan.schedule, name="any")
    bare = replace(
        plan, schedule=schedule, stages=stages, predicted={}, planner="", alternatives={}
    )
    text = bare.to_json()
    found = known.get(text)
    if found is None:
        found = known[text] = lower_plan(even(graph), plan)
        if len(known) > _MOST:
            known.popitem(last=False)
        return found
    return with_schedule(found, plan.schedule.name, plan.microbatches)


def forget_lowered(graph: OpGraph) -> None:
    """Lets go of what is kept: the search is over."""
    graph.memo.pop(_KEY, None)
