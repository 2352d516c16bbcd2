"""A simulated step in words: what `raypar simulate` prints."""

from __future__ import annotations

from raypar._plan_text import table
from raypar.search.simulation import Simulation

_KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward (input half)",
    "W": "backward (weight half)",
    "O": "optimizer",
    "G": "gathering parameters",
    "transfer": "transfers",
    "sync": "gradient sums",
    "norm": "the norm over all ranks",
}
_SHOWN_LINKS = 4
_SHOWN_PARTS = 3


def summary(simulation: Simulation) -> str:
    """Step time, throughput, idle time, critical path, memory against the limit, and links."""
    step = simulation.step_s
    lines = [
        f"step {step * 1e3:.4g} ms, {simulation.samples_per_s:.4g} samples/s ({simulation.source})",
        f"idle {simulation.bubble:.1%} of device time",
        f"critical path: {_path(simulation)}",
        "",
        *_lanes(simulation),
    ]
    links = sorted(simulation.links, key=lambda link: -link.busy)[:_SHOWN_LINKS]
    if links:
        lines += ["", "busiest ports:"]
        lines += [
            f"  device {link.device}, {link.tier}: {_size(link.nbytes)} a step, "
            f"busy {link.busy:.1%}"
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
                f"{lane.label} needs {_size(timeline.peak_bytes)}, its devices hold "
                f"{_size(lane.memory_limit)}; most of it is {most} "
                f"({_size(timeline.peak_parts[most])})"
            )
    return found


def _path(simulation: Simulation) -> str:
    shares = simulation.path_shares()
    return ", ".join(f"{share:.0%} {_KINDS.get(k, k)}" for k, share in shares.items() if share)


def _lanes(simulation: Simulation) -> list[str]:
    lanes, memory = simulation.lanes, simulation.memory
    columns = [
        ("ranks", [lane.label for lane in lanes]),
        ("devices", [_span(lane.devices) for lane in lanes]),
        ("stages", [_span(lane.stages) for lane in lanes]),
        ("compute", [f"{lane.compute:.0%}" for lane in lanes]),
        ("comm", [f"{lane.communication:.0%}" for lane in lanes]),
        ("idle", [f"{lane.idle:.0%}" for lane in lanes]),
        ("memory", [_size(m.peak_bytes) for m in memory]),
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
    largest = sorted(parts.items(), key=lambda item: -item[1])[:_SHOWN_PARTS]
    return ", ".join(f"{name} {_size(size)}" for name, size in largest if size)


def _span(numbers: tuple[int, ...]) -> str:
    """``0-7``, ``0,2`` or ``0,2,... (9)``."""
    first, last = numbers[0], numbers[-1]
    if numbers == tuple(range(first, last + 1)) and len(numbers) > 1:
        return f"{first}-{last}"
    shown = ",".join(map(str, numbers[:4]))
    return shown if len(numbers) <= 4 else f"{shown},... ({len(numbers)})"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
