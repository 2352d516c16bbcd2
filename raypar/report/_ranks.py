"""What the ranks of a simulated step do with their time and their memory."""

from __future__ import annotations

from raypar._plan_text import duration, size, span, throughput
from raypar.report._words import bar, paragraph
from raypar.report.simulation import path_words
from raypar.search.simulation import LaneReport, MemoryTimeline, Simulation

_SHOWN = 12


def step_lines(simulation: Simulation) -> list[str]:
    """The whole step: its length, what that rests on, and what it is made of."""
    hint = "" if simulation.calibrated else "; `raypar probe` measures this cluster"
    return [
        f"step {duration(simulation.step_s)}, {throughput(simulation.samples_per_s)}, "
        f"idle {100 * simulation.bubble:.0f} % of device time",
        f"costs: {simulation.source}{hint}",
        *paragraph("critical path: ", path_words(simulation), ", "),
    ]


def rank_lines(simulation: Simulation) -> list[str]:
    """For every rank group its time shares and a bar of its memory against the limit.

    Groups that read alike share their lines; where there are many, those that fill most are shown.
    """
    groups: dict[tuple[str, ...], list[LaneReport]] = {}
    fullest: dict[tuple[str, ...], float] = {}
    for lane, memory in zip(simulation.lanes, simulation.memory, strict=True):
        key = tuple(_lane(lane, memory))
        groups.setdefault(key, []).append(lane)
        fullest[key] = memory.peak_bytes / lane.memory_limit
    chosen = sorted(fullest, key=lambda key: -fullest[key])[:_SHOWN]
    lines = ["what ranks do with their time, and what each of them holds at its peak:"]
    for key, lanes in groups.items():
        if key in chosen:
            more = f" and {len(lanes) - 1} more alike" if len(lanes) > 1 else ""
            first = lanes[0]
            devices = f"device{'s' * (len(first.devices) > 1)} {span(first.devices)}"
            lines.append(f"  {first.label} ({devices}){more}: {key[0]}")
            lines += key[1:]
    if len(groups) > _SHOWN:
        lines.append(f"  and {len(groups) - _SHOWN} more that fill less of their memory")
    return lines


def _lane(lane: LaneReport, memory: MemoryTimeline) -> list[str]:
    share = memory.peak_bytes / lane.memory_limit
    parts = sorted(memory.peak_parts.items(), key=lambda item: -item[1])
    words = [f"{name} {size(held)}" for name, held in parts if held]
    over = ", MORE THAN THERE IS" if share > 1.0 else ""
    return [
        f"compute {lane.compute:.0%}, communication {lane.communication:.0%}, idle {lane.idle:.0%}",
        f"    {bar(share)} {size(memory.peak_bytes)} of {size(lane.memory_limit)} "
        f"({share:.1%}{over})",
        *paragraph("    ", words, ", "),
    ]
