"""What a step of many microbatches comes to, told from steps of few."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raypar.lowered import LoweredPlan, with_schedule
from raypar.plan import Plan
from raypar.schedules.registry import get_schedule
from raypar.search._sim_input import Setting
from raypar.search.simulate import simulate_lists
from raypar.search.simulation import Simulation


@dataclass(frozen=True)
class Likely:
    """What a step likely comes to.

    Attributes:
        played: A step of as few microbatches as tell, with the seconds that one of all takes.
        peak_bytes: By lane, most bytes that a device holds in a step of all of them.
        whole: Whether it was played with all of them.
    """

    played: Simulation
    peak_bytes: tuple[int, ...]
    whole: bool

    @property
    def step_s(self) -> float:
        """Seconds of a step of all microbatches."""
        return self.played.step_s


def likely(plan: Plan, lowered: LoweredPlan, setting: Setting) -> Likely:
    """Continues two steps of few microbatches.

    Once a pipeline is full, every further microbatch adds the same time, and where a schedule holds
    them all, the same bytes: a step of M of them is continued from one with two and one with four
    times as many as fill it.

    Args:
        plan: The plan, with the schedule to play.
        lowered: It lowered, under whatever schedule.
        setting: What it is played with.

    Raises:
        ScheduleError: The schedule does not take the plan's placement.
    """
    fill = get_schedule(plan.schedule.name).rounds_under_way * len(setting.meshes)
    few, more = 2 * fill, 4 * fill  # multiples of the groups, as interleaving asks
    if plan.microbatches <= 2 * more:
        played = played_whole(plan, lowered, setting)
        return Likely(played, tuple(played.peak_bytes), True)
    short, longer = (_played(plan, lowered, setting, count) for count in (few, more))
    further = (plan.microbatches - more) / (more - few)
    step_s = longer.step_s + further * (longer.step_s - short.step_s)
    peaks = tuple(
        high + round(further * max(0, high - low))
        for low, high in zip(short.peak_bytes, longer.peak_bytes, strict=True)
    )
    return Likely(replace(longer, step_s=step_s), peaks, False)


def played_whole(plan: Plan, lowered: LoweredPlan, setting: Setting) -> Simulation:
    """A step of all microbatches."""
    return _played(plan, lowered, setting, plan.microbatches)


def _played(plan: Plan, lowered: LoweredPlan, setting: Setting, count: int) -> Simulation:
    share = count / plan.microbatches
    globals_s = {stage: seconds * share for stage, seconds in setting.globals_s.items()}
    return simulate_lists(
        with_schedule(lowered, plan.schedule.name, count).lists,
        replace(setting, microbatches=count, globals_s=globals_s),
        global_batch=plan.global_batch,
    )
