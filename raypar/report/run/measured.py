"""From what ranks told of themselves to a step in time, as simulated ones are drawn.

One step is what lies between two ends of the norm, as in a simulation: it begins with the optimizer
of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind
from raypar.search.simulation import MOVING, LaneReport, MemoryTimeline, Span
from raypar.train.breakdown import PARTS, Breakdown, Meetings, RankLists, meetings_of
from raypar.train.timeline import Timeline

_KINDS = {**{kind: kind.value for kind in COMPUTE}, Kind.OPTIMIZER: "O", Kind.GLOBALS: "G"}
_SAVED = MOVING.index("saved")
_GRADIENTS = MOVING.index("gradients")
_LEAST_S = 1e-9


@dataclass(frozen=True)
class MeasuredStep:
    """A step as it went; a `raypar.report._played.PlayedStep`.

    Attributes:
        step: Its number.
        step_s: Its seconds.
        lanes: A lane for every replica of every rank group: its rank that computes longest.
        memory: What these ranks hold; empty where that is not known.
        ranks: The rank of every lane.
    """

    step: int
    step_s: float
    lanes: tuple[LaneReport, ...]
    memory: tuple[MemoryTimeline, ...]
    ranks: tuple[int, ...]
    _spans: tuple[tuple[Span, ...], ...] = field(repr=False)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per lane the most that its rank holds; zeros where that is not known."""
        return tuple(m.peak_bytes for m in self.memory) or (0,) * len(self.lanes)

    @property
    def bubble(self) -> float:
        """Mean share of the step in which lanes wait for somebody."""
        return sum(lane.idle for lane in self.lanes) / len(self.lanes)

    def spans(self, lane: int) -> list[Span]:
        """What a lane does, in order."""
        return list(self._spans[lane])


def measured_step(timeline: Timeline, limits: dict[int, int] | None = None) -> MeasuredStep:
    """The most typical step of a timeline: of those that are known as a whole, the median one.

    Args:
        timeline: What ranks told. A step is known as a whole where the one before it and the one
            behind it are known too; where there is none, the last step is shown as far as it is.
        limits: Rank group → bytes that its devices may fill, where that is known.
    """
    meetings = meetings_of(timeline.lists)
    at, begin, end = _typical(timeline, meetings)
    ranks = range(len(timeline.lists.ranks))
    everyone = [_clipped(all_spans(timeline, rank, meetings), begin, end) for rank in ranks]
    chosen = _longest(timeline.lists, everyone)
    step_s = end - begin
    known = bool(timeline.held) and all(timeline.held[rank] for rank in chosen)
    return MeasuredStep(
        timeline.steps[at],
        step_s,
        tuple(_lane(timeline, rank, everyone[rank], step_s, limits or {}) for rank in chosen),
        tuple(_memory(timeline, at, rank, begin, end) for rank in chosen) if known else (),
        tuple(chosen),
        tuple(tuple(everyone[rank]) for rank in chosen),
    )


def _typical(timeline: Timeline, meetings: Meetings) -> tuple[int, float, float]:
    """(place in the timeline, beginning, end) of the step to show."""
    if not len(meetings.norms):
        last = timeline.stamps[-1]
        return len(timeline.steps) - 1, float(last.min()), float(last.max())
    ends = timeline.stamps[:, meetings.norms + 1].max(axis=1)
    if len(ends) == 1:
        first = float(timeline.stamps[0].min())
        return 0, first, max(float(ends[0]), first + _LEAST_S)
    # On ranks that leave the last norm before others, it is not known what came then.
    lengths = np.diff(ends)[: max(1, len(ends) - 2)]
    at = int(np.argsort(lengths, kind="stable")[len(lengths) // 2]) + 1
    return at, float(ends[at - 1]), max(float(ends[at]), float(ends[at - 1]) + _LEAST_S)


def rank_parts(timeline: Timeline) -> np.ndarray:
    """``[ranks, parts]``: mean seconds of `raypar.train.breakdown.PARTS` over all steps.

    ``other`` is not filled: the steps' own lengths are not part of a timeline. ``data`` is what
    lies between two steps.
    """
    breakdown = Breakdown(timeline.lists)
    found = [breakdown.of_stamps(stamps) for stamps in timeline.stamps]
    mean: np.ndarray = np.mean(found, axis=0)
    gaps = [_between(timeline, at) for at in range(1, len(timeline.steps))]
    if gaps:
        mean[:, PARTS.index("data")] = np.mean(gaps, axis=0)
    mean[:, PARTS.index("other")] = 0.0
    return mean


def _between(timeline: Timeline, at: int) -> np.ndarray:
    """``[ranks]``: seconds from the end of the step before to the beginning of this one."""
    starts = np.array(timeline.lists.starts)
    ended = timeline.stamps[at - 1][starts[1:] - 1]
    return np.maximum(timeline.stamps[at][starts[:-1]] - ended, 0.0)


def all_spans(timeline: Timeline, rank: int, meetings: Meetings) -> list[Span]:
    """All recorded steps of a rank, one after the other."""
    found: list[Span] = []
    start, end = timeline.lists.starts[rank : rank + 2]
    program = timeline.lists.lists[timeline.lists.ranks[rank][0]]
    senders = {int(take): row for take, row in zip(meetings.takes, meetings.senders, strict=True)}
    ended: float | None = None
    for stamps in timeline.stamps:
        own = stamps[start:end]
        if ended is not None and own[0] > ended:
            found.append(Span("DATA", "data", ended, float(own[0])))
        came = stamps[meetings.norms].max() if len(meetings.norms) else -np.inf
        for at, now in enumerate(program):
            a, b = float(own[at]), float(own[at + 1])
            if now.kind in RECV and start + at in senders:
                handed = float(stamps[senders[start + at]].max())
            elif now.kind is Kind.NORM:
                handed = float(came)
            else:
                found.append(Span(_name(now), _kind(now), a, b))
                continue
            border = min(max(handed, a), b)
            found += [Span(str(now), "wait", a, border), Span(str(now), "comm", border, b)]
        found.append(Span("END", "comm", float(own[-2]), float(own[-1])))
        ended = float(own[-1])
    return [span for span in found if span.end > span.start]


def _name(now: Instruction) -> str:
    return "OPTIMIZER" if now.kind is Kind.OPTIMIZER else str(now)


def _kind(now: Instruction) -> str:
    if now.kind in SEND or now.kind is Kind.GRAD_SYNC:
        return "comm"
    return _KINDS.get(now.kind, "other")


def _clipped(spans: list[Span], begin: float, end: float) -> list[Span]:
    """What lies between two times, which become the first and the last one."""
    return [
        Span(s.name, s.kind, max(s.start, begin) - begin, min(s.end, end) - begin)
        for s in spans
        if s.end > begin and s.start < end
    ]


def _longest(lists: RankLists, spans: list[list[Span]]) -> list[int]:
    """For every replica of every rank group the rank that computes longest."""
    letters = {kind.value for kind in COMPUTE}

    def computes(rank: int) -> float:
        return sum(s.end - s.start for s in spans[rank] if s.kind in letters)

    members: dict[tuple[int, int], list[int]] = {}
    for rank, key in enumerate(lists.ranks):
        members.setdefault(key, []).append(rank)
    return [max(own, key=computes) for _, own in sorted(members.items())]


def _lane(
    timeline: Timeline, rank: int, spans: list[Span], step_s: float, limits: dict[int, int]
) -> LaneReport:
    group, replica = timeline.lists.ranks[rank]
    several = len({r for g, r in timeline.lists.ranks if g == group}) > 1
    sums: dict[str, float] = {}
    for span in spans:
        sums[span.kind] = sums.get(span.kind, 0.0) + (span.end - span.start) / step_s
    comm, idle = sums.get("comm", 0.0), sums.get("wait", 0.0) + sums.get("data", 0.0)
    return LaneReport(
        group,
        replica if several else None,
        tuple(
            device
            for device, key in zip(timeline.devices, timeline.lists.ranks, strict=True)
            if key == (group, replica)
        ),
        timeline.stages[rank],
        sum(sums.values()) - comm - idle,
        comm,
        idle,
        limits.get(group, 0),
    )


def _memory(timeline: Timeline, step: int, rank: int, begin: float, end: float) -> MemoryTimeline:
    """What a rank holds: its tensors from step to step, and what it keeps for backward.

    The latter is known after every instruction of the rank's first step; shapes are the same in
    all steps, so it is drawn at the times of the one that is shown.
    """
    start, stop = timeline.lists.starts[rank : rank + 2]
    stamps = timeline.stamps[step][start:stop]
    saved = np.array((0, *timeline.saved[rank], 0), dtype=float)[: len(stamps)]
    saved = np.pad(saved, (0, len(stamps) - len(saved)))
    times = np.concatenate([[0.0], np.clip(stamps - begin, 0.0, end - begin)])
    saved = np.concatenate([[0.0], saved])
    held = timeline.held[rank]
    moving = np.zeros((len(MOVING), len(times)))
    moving[_SAVED] = saved
    moving[_GRADIENTS] = held.get("gradients", 0)
    resident = {name: held.get(name, 0) for name in ("parameters", "optimizer")}
    at = int(saved.argmax())
    parts = {
        **resident,
        "gradients": held.get("gradients", 0),
        "saved": int(saved[at]),
    }
    return MemoryTimeline(resident, sum(parts.values()), float(times[at]), parts, {}, times, moving)
