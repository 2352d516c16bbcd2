"""Rows of the page's tables: ranks, links, events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypar._plan_text import duration, size, span
from raypar.report.page._bands import Part
from raypar.report.run._curves import STYLE, number
from raypar.report.run.measured import rank_parts
from raypar.report.run.predicted import Prediction
from raypar.train.breakdown import PARTS, busiest, meetings_of
from raypar.train.timeline import Timeline

_MOST_RANKS = 16
_MOST_EVENTS = 200


@dataclass(frozen=True, slots=True)
class RankRow:
    """A rank: its name, where it is, its parts as a bar, its own work in words, and its share."""

    name: str
    where: str
    parts: list[Part]
    own: str
    against: str
    slowest: bool


@dataclass(frozen=True, slots=True)
class LinkRow:
    """What goes from one rank group to another in a step."""

    name: str
    count: str
    nbytes: str
    under_way: str
    waited: str
    rate: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened: when (words), after how many steps, its kind, and what."""

    when: str
    step: int
    kind: str
    text: str


def rank_rows(timeline: Timeline) -> list[RankRow]:
    """The ranks that have most to do themselves, slowest first."""
    parts = rank_parts(timeline)
    whole = float(parts.sum(axis=1).max()) or 1.0
    own = parts[:, [PARTS.index(p) for p in ("compute", "optimizer", "data")]].sum(axis=1)
    first = busiest(parts)
    typical = float(np.median(own)) or 1.0
    found = []
    for rank in sorted(range(len(own)), key=lambda r: -own[r])[:_MOST_RANKS]:
        _, replica = timeline.lists.ranks[rank]
        node = timeline.lists.nodes[rank]
        stages = timeline.stages[rank]
        word = "stage" if len(stages) == 1 else "stages"
        found.append(
            RankRow(
                f"rank {rank}: {word} {span(stages)}, replica {replica}",
                f"device {timeline.devices[rank]}" + (f" on {node}" if node else ""),
                [
                    Part(f"k-{STYLE[part]}", seconds / whole, f"{part}: {duration(seconds)}")
                    for part, seconds in zip(PARTS, parts[rank].tolist(), strict=True)
                    if seconds > 0
                ],
                duration(float(own[rank])),
                f"{100 * (own[rank] / typical - 1):+.0f} %",
                rank == first,
            )
        )
    return found


def link_rows(timeline: Timeline | None, prediction: Prediction | None) -> list[LinkRow]:
    """Rank groups that send to each other: bytes as planned, times as measured."""
    measured = {} if timeline is None else _measured_links(timeline)
    planned = {} if prediction is None else {(m.source, m.target): m for m in prediction.moved}
    found = []
    for key in sorted({*measured, *planned}):
        moved, times = planned.get(key), measured.get(key)
        rate = ""
        if moved is not None and times is not None and times[1] > 0:
            rate = f"{size(moved.nbytes / moved.count / times[1])}/s"
        found.append(
            LinkRow(
                f"rank group {key[0]} → {key[1]}",
                str(times[0] if times else moved.count if moved else ""),
                size(moved.nbytes) if moved else "not known",
                (duration(times[1]) if times[1] else "at once") if times else "not known",
                duration(times[2]) if times else "not known",
                rate,
            )
        )
    return found


def _measured_links(timeline: Timeline) -> dict[tuple[int, int], tuple[int, float, float]]:
    """(from, to) → messages a step, median seconds under way, seconds that receivers waited."""
    meetings = meetings_of(timeline.lists)
    starts = np.array(timeline.lists.starts)
    pairs: dict[tuple[int, int], list[int]] = {}
    for at, (taker, senders) in enumerate(zip(meetings.takers, meetings.senders, strict=True)):
        source = int(np.searchsorted(starts, senders[0], "right")) - 1
        key = (timeline.lists.ranks[source][0], timeline.lists.ranks[int(taker)][0])
        pairs.setdefault(key, []).append(at)
    found = {}
    for key, own in pairs.items():
        takes = meetings.takes[own]
        handed = timeline.stamps[:, meetings.senders[own]].max(axis=2)
        began, taken = timeline.stamps[:, takes], timeline.stamps[:, takes + 1]
        # A message that lay there already was under way for no longer than it took to pick it up.
        under_way = np.clip(taken - np.maximum(handed, began), 0.0, None)
        waited = (taken - began).sum(axis=1)
        found[key] = (len(own), float(np.median(under_way)), float(np.median(waited)))
    return found


def event_rows(events: Sequence[dict[str, Any]]) -> list[EventRow]:
    """All events, in order; of very many the first and the last ones."""
    rows = []
    for event in events:
        at, step = number(event.get("time")), event.get("step")
        when = "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        rows.append(
            EventRow(
                when,
                step if isinstance(step, int) else 0,
                str(event.get("kind", "event")),
                str(event.get("text", "")),
            )
        )
    if len(rows) <= _MOST_EVENTS:
        return rows
    half = _MOST_EVENTS // 2
    left = EventRow("", 0, "…", f"{len(rows) - 2 * half} more events")
    return [*rows[:half], left, *rows[-half:]]
