"""A simulated step as a Chrome trace: open the file in https://ui.perfetto.dev.

One process for every lane: what it computes and waits for, its messages by receiver with arrows
from the sender to where they are taken, and what it holds in memory. The format is that of
"Trace Event Format" (Google, 2016); times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raypar.errors import ConfigError
from raypar.search.simulation import MOVING, MemoryTimeline, Message, Simulation

_US = 1e6
_COMPUTE = 0
_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, input half",
    "W": "backward, weight half",
    "O": "optimizer",
    "G": "counts",
    "wait": "idle",
    "comm": "communication",
}


def trace_events(simulation: Simulation) -> list[dict[str, Any]]:
    """The events of a trace."""
    return [
        *_names(simulation),
        *_spans(simulation),
        *_messages(simulation),
        *_memory(simulation.memory),
    ]


def write_trace(simulation: Simulation, path: str | Path) -> None:
    """Writes the trace as JSON.

    Raises:
        ConfigError: The file cannot be written.
    """
    document = {
        "traceEvents": trace_events(simulation),
        "displayTimeUnit": "ms",
        "otherData": {"step_s": simulation.step_s, "source": simulation.source},
    }
    try:
        Path(path).write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--trace: cannot write {str(path)!r}: {error.strerror}") from None


def _names(simulation: Simulation) -> Iterator[dict[str, Any]]:
    for pid, lane in enumerate(simulation.lanes):
        devices = ", ".join(map(str, lane.devices))
        stages = ", ".join(map(str, lane.stages))
        name = f"{lane.label}: stages {stages} on devices {devices}"
        yield _meta("process_name", pid, _COMPUTE, name)
        yield _meta("thread_name", pid, _COMPUTE, "compute")
        for other, peer in enumerate(simulation.lanes):
            if other != pid:
                yield _meta("thread_name", pid, 1 + other, f"to {peer.label}")


def _meta(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _spans(simulation: Simulation) -> Iterator[dict[str, Any]]:
    for pid in range(len(simulation.lanes)):
        for span in simulation.spans(pid):
            yield {
                "ph": "X",
                "name": span.name,
                "cat": _NAMES.get(span.kind, span.kind),
                "pid": pid,
                "tid": _COMPUTE,
                "ts": span.start * _US,
                "dur": (span.end - span.start) * _US,
            }


def _messages(simulation: Simulation) -> Iterator[dict[str, Any]]:
    """A slice for every message, and an arrow from its sender over it to its receiver."""
    found = simulation.messages()
    for number, (message, end) in enumerate(zip(found, _link_ends(found), strict=True)):
        name = f"{message.value} of microbatch {message.microbatch}"
        link = {"pid": message.source, "tid": 1 + message.target}
        yield {
            "ph": "X",
            "name": name,
            "cat": "transfer",
            "ts": message.started * _US,
            "dur": (end - message.started) * _US,
            "args": {"bytes": message.nbytes, "sent_us": message.sent * _US},
            **link,
        }
        arrow = {"name": "transfer", "cat": "transfer", "id": number}
        sender = {"pid": message.source, "tid": _COMPUTE, "ts": message.sent * _US}
        taken = {"pid": message.target, "tid": _COMPUTE, "ts": message.arrived * _US}
        yield {"ph": "s", **arrow, **sender}
        yield {"ph": "t", **arrow, **link, "ts": message.started * _US}
        yield {"ph": "f", "bp": "e", **arrow, **taken}


def _link_ends(messages: Sequence[Message]) -> list[float]:
    """When each message leaves its link: the next may start there while it is still under way."""
    ends = [message.arrived for message in messages]
    last: dict[tuple[int, int], int] = {}
    for number in sorted(range(len(messages)), key=lambda i: messages[i].started):
        pair = (messages[number].source, messages[number].target)
        if pair in last:
            ends[last[pair]] = min(ends[last[pair]], messages[number].started)
        last[pair] = number
    return ends


def _memory(timelines: Sequence[MemoryTimeline]) -> Iterator[dict[str, Any]]:
    for pid, timeline in enumerate(timelines):
        resident = sum(timeline.resident.values())
        moving = list(zip(MOVING, timeline.moving, strict=True))
        for at, time in enumerate(timeline.times):
            yield {
                "ph": "C",
                "name": "memory",
                "pid": pid,
                "tid": _COMPUTE,
                "ts": float(time) * _US,
                "args": {
                    "resident": resident,
                    **{name: int(row[at]) for name, row in moving},
                },
            }
