"""A run's predicted and measured steps as a Chrome trace: open it in https://ui.perfetto.dev.

One process for every rank of the measured steps, with arrows from where a message was handed over
to where it was taken; before them one for every lane of the prediction. The format is that of
"Trace Event Format" (Google, 2016); times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raypar._plan_text import span as numbers
from raypar.errors import ConfigError
from raypar.report.page._words import KINDS
from raypar.report.run.files import read_run
from raypar.report.run.measured import all_spans
from raypar.report.run.predicted import Prediction
from raypar.schedules.instructions import RECV
from raypar.search.simulation import Span
from raypar.train.breakdown import meetings_of
from raypar.train.timeline import Timeline

_US = 1e6
_PREDICTED = 100_000  # process ids of predicted lanes begin here


def write_run_trace(run_folder: Path, out: Path) -> None:
    """Writes the trace of a run.

    Raises:
        ConfigError: It is no run's folder, a file in it is damaged, there is no step to show, or
            `out` cannot be written.
    """
    run = read_run(Path(run_folder))
    if run.timeline is None and run.prediction is None:
        raise ConfigError(
            f"{str(run_folder)!r} has neither timeline.json nor predicted.json: there is no step "
            "to trace; a run writes the first when it ends"
        )
    events: list[dict[str, Any]] = []
    if run.prediction is not None:
        events += _predicted(run.prediction)
    if run.timeline is not None:
        events += _measured(run.timeline)
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run": run.name}}
    try:
        Path(out).write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--trace: cannot write {str(out)!r}: {error.strerror}") from None


def _predicted(prediction: Prediction) -> Iterator[dict[str, Any]]:
    for at, lane in enumerate(prediction.lanes):
        pid = _PREDICTED + at
        yield _name(pid, f"predicted: {lane.label}, stages {numbers(lane.stages)}")
        for one in prediction.spans(at):
            yield _slice(pid, one)


def _measured(timeline: Timeline) -> Iterator[dict[str, Any]]:
    meetings = meetings_of(timeline.lists)
    starts = np.array(timeline.lists.starts)
    for rank, (group, replica) in enumerate(timeline.lists.ranks):
        yield _name(
            rank,
            f"rank {rank}: stages {numbers(timeline.stages[rank])}, rank group {group}, replica "
            f"{replica}",
        )
        for one in all_spans(timeline, rank, meetings):
            yield _slice(rank, one)
        for stamps in timeline.stamps:
            yield from _held(timeline, rank, stamps[starts[rank] : starts[rank + 1]])
    number = 0
    for stamps in timeline.stamps:
        for take, taker, senders in zip(
            meetings.takes, meetings.takers, meetings.senders, strict=True
        ):
            last = int(senders[stamps[senders].argmax()])
            source = int(np.searchsorted(starts, last, "right")) - 1
            program = timeline.lists.lists[timeline.lists.ranks[int(taker)][0]]
            now = program[int(take - starts[int(taker)])]
            assert now.kind in RECV
            arrow = {"name": str(now), "cat": "transfer", "id": number}
            taken = float(stamps[take + 1]) * _US
            # A message may be there before its sender gets to look at the clock again.
            sent = min(float(stamps[last]) * _US, taken)
            yield {"ph": "s", **arrow, "pid": source, "tid": 0, "ts": sent}
            yield {"ph": "f", "bp": "e", **arrow, "pid": int(taker), "tid": 0, "ts": taken}
            number += 1


def _held(timeline: Timeline, rank: int, stamps: np.ndarray) -> Iterator[dict[str, Any]]:
    """A counter of what the rank keeps for backward, where that is known and changes."""
    if not timeline.saved or not timeline.saved[rank]:
        return
    before = -1
    for at, nbytes in enumerate(timeline.saved[rank][: len(stamps) - 1]):
        if nbytes != before:
            yield {
                "ph": "C", "name": "kept for backward", "pid": rank, "tid": 0,
                "ts": float(stamps[at + 1]) * _US, "args": {"bytes": nbytes},
            }  # fmt: skip
        before = nbytes


def _name(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}


def _slice(pid: int, one: Span) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": one.name,
        "cat": KINDS.get(one.kind, (one.kind, ""))[0],
        "pid": pid,
        "tid": 0,
        "ts": one.start * _US,
        "dur": (one.end - one.start) * _US,
    }
