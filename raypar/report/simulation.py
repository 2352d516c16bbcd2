"""A simulated step in words: what `raypar simulate` prints."""

from __future__ import annotations

from raypar._plan_text import duration, size, span, table, throughput
from raypar.search.simulation import Simulation

_KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward (input half)",
    "W": "backward (weight half)",
    "O": "optimizer",
    "G": "counting the batch",
    "transfer": "transfers",
    "sync": "gradient sums and updated parameters",
    "norm": "the norm over all ranks",
}
_SHOWN_LINKS = 4
_SHOWN_PARTS = 2


def summary(simulation: Simulation) -> str:
    """Step time, throughput, idle time, critical path, memory against the limit, and links."""
    step = simulation.step_s
    lines = [
        f"step {duration(step)}, {throughput(simulation.samples_per_s)} ({simulation.source})",
        f"idle {simulation.bubble:.1%} of device time",
        f"critical path: {', '.join(path_words(simulation))}",
        "",
        *_lanes(simulation),
    ]
    links = sorted(simulation.links, key=lambda link: -link.busy)[:_SHOWN_LINKS]
    if links:
        lines += ["", "busiest ports:"]
        lines += [
            f"  device {link.device}, {link.tier}: {size(link.nbytes)} a step, busy {link.busy:.1%}"
            for link in links
        ]
    return "\n".join(lines)


def over_limit(simulation: Simulation) -> list[str]:
    """One line for every lane whose peak is above what its devices hold."""
    found = []
    for lane, timeline in zip(simulation.lanes, simulation.memory, strict=True):
        if timeline.peak_bytes > lane.memory_limit:
            most = max(timeline.peak_parts, key=lambda k: timeline.peak_parts[k])
            found.append(
                f"{lane.label} needs {size(timeline.peak_bytes)}, its devices hold "
                f"{size(lane.memory_limit)}; most of it is {most} "
                f"({size(timeline.peak_parts[most])})"
            )
    return found


def path_words(simulation: Simulation) -> list[str]:
    """``55% backward``, ``31% forward``, ...: what the critical path is made of."""
    shares = simulation.path_shares()
    return [f"{share:.0%} {_KINDS.get(k, k)}" for k, share in shares.items() if share >= 0.005]


def _lanes(simulation: Simulation) -> list[str]:
    lanes, memory = simulation.lanes, simulation.memory
    columns = [
        ("ranks", [lane.label for lane in lanes]),
        ("devices", [span(lane.devices) for lane in lanes]),
        ("stages", [span(lane.stages) for lane in lanes]),
        ("compute", [f"{lane.compute:.0%}" for lane in lanes]),
        ("comm", [f"{lane.communication:.0%}" for lane in lanes]),
        ("idle", [f"{lane.idle:.0%}" for lane in lanes]),
        ("memory", [size(m.peak_bytes) for m in memory]),
        (
            "of limit",
            [
                f"{m.peak_bytes / lane.memory_limit:.1%}"
                for m, lane in zip(memory, lanes, strict=True)
            ],
        ),
        ("mostly", [_mostly(m.peak_parts) for m in memory]),
    ]
    return table(columns)


def _mostly(parts: dict[str, int]) -> str:
    """``61% saved, 16% transient``: short enough for a row to keep within its columns."""
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:_SHOWN_PARTS]
    return ", ".join(f"{held / total:.0%} {name}" for name, held in largest if held)
