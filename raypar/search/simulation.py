"""A simulated step: who does what when, what it holds and sends, and what its length is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raypar.schedules.instructions import COMPUTE, Instruction, Kind
from raypar.search._sim_build import Built
from raypar.search._sim_input import Setting
from raypar.search._sim_memory import MOVING, MemoryTimeline, memory_of
from raypar.search._sim_path import Link, critical_path
from raypar.search._sim_program import AWAIT, DRAIN, MEET, OPTIMIZE, TAKE
from raypar.search._sim_run import Played

__all__ = [
    "MOVING",
    "LaneReport",
    "Link",
    "LinkUse",
    "MemoryTimeline",
    "Message",
    "Simulation",
    "Span",
]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a lane does for a while.

    Attributes:
        name: The instruction as text; ``OPTIMIZER`` begins the step.
        kind: ``F``, ``B``, ``I``, ``W``, ``O`` (optimizer), ``G`` (counts of the batch),
            ``wait`` (nothing to do yet), ``comm`` (what it waits for is under way).
        start: Seconds from the beginning of the step.
        end: The same.
    """

    name: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Message:
    """One value that moved between lanes.

    Attributes:
        value: The edge, or ``grad:`` and the edge.
        microbatch: Which microbatch.
        source: Sending lane.
        target: Receiving lane.
        sent: When it was handed over, in seconds from the beginning of the step.
        started: When it got the link.
        arrived: When it was there.
        nbytes: Its bytes, all ranks of the lane together.
    """

    value: str
    microbatch: int
    source: int
    target: int
    sent: float
    started: float
    arrived: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class LaneReport:
    """Ranks that go in step, and how they spend a step. The three shares add up to 1.

    Attributes:
        group: Their rank group.
        replica: Their replica, or None where all replicas go in step.
        devices: Their devices.
        stages: The stages they hold.
        compute: Share of the step in which they compute.
        communication: Share in which they are in collectives, or wait for what is under way.
        idle: Share in which they wait for somebody who has not yet sent: the bubble.
        memory_limit: Bytes that the smallest of the devices may fill.
    """

    group: int
    replica: int | None
    devices: tuple[int, ...]
    stages: tuple[int, ...]
    compute: float
    communication: float
    idle: float
    memory_limit: int

    @property
    def label(self) -> str:
        """Name for reports."""
        own = f"rank group {self.group}"
        return own if self.replica is None else f"{own}, replica {self.replica}"


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one device sends to one tier in a step.

    Attributes:
        device: The device.
        tier: ``inside`` its node or ``across`` nodes.
        nbytes: Bytes sent.
        busy: Share of the step for which its port is needed at full speed.
    """

    device: int
    tier: str
    nbytes: int
    busy: float


@dataclass(frozen=True)
class Simulation:
    """One step of a run of steps, from NORM to NORM.

    Attributes:
        step_s: Seconds of a step.
        global_batch: Samples of a step.
        lanes: Ranks that go in step.
        links: What devices send.
        calibrated: Whether the figures rest on measurements.
        source: Where they come from, in words.
    """

    step_s: float
    global_batch: int
    lanes: tuple[LaneReport, ...]
    links: tuple[LinkUse, ...]
    calibrated: bool
    source: str
    _lists: Sequence[Sequence[Instruction]] = field(repr=False)
    _setting: Setting = field(repr=False)
    _built: Built = field(repr=False)
    _played: Played = field(repr=False)

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.global_batch / self.step_s if self.step_s > 0 else 0.0

    @property
    def bubble(self) -> float:
        """Share of device time in which devices are idle."""
        ranks = [len(lane.devices) for lane in self.lanes]
        idle = sum(n * lane.idle for n, lane in zip(ranks, self.lanes, strict=True))
        return idle / sum(ranks)

    @cached_property
    def memory(self) -> tuple[MemoryTimeline, ...]:
        """Per lane what each of its ranks holds over time."""
        return tuple(
            memory_of(i, self._list(i), self._setting, self._built, self._played)
            for i in range(len(self.lanes))
        )

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per lane the most that one of its ranks holds, in bytes."""
        return tuple(timeline.peak_bytes for timeline in self.memory)

    @cached_property
    def critical_path(self) -> tuple[Link, ...]:
        """The chain of work and transfers that the step's length is made of, first piece first."""
        return tuple(critical_path(self._built, self._played))

    def describe(self, link: Link) -> str:
        """The instruction of a piece of the critical path, as text."""
        return self._name(link.lane, link.position)

    def path_shares(self) -> dict[str, float]:
        """Kind of work → share of the critical path, largest first.

        Kinds are those of `Span` (``F``, ``B``, …) and ``transfer``, ``sync``, ``norm``.
        """
        found: dict[str, float] = {}
        for link in self.critical_path:
            what = link.what
            if what == "work":
                what = self._kind(link.lane, link.position)
            found[what] = found.get(what, 0.0) + link.seconds
        whole = sum(found.values()) or 1.0
        return {k: v / whole for k, v in sorted(found.items(), key=lambda item: -item[1])}

    def spans(self, lane: int) -> list[Span]:
        """What a lane does, in order; zero-time instructions are left out."""
        found: list[Span] = []
        program, ends = self._built.program, self._played.ends[lane]
        start = 0.0
        for at, end in enumerate(ends):
            position = program.labels[lane][at]
            if end > start:
                kinds = self._op_spans(lane, at, start, end)
                for kind, a, b in kinds:
                    found.append(Span(self._name(lane, position), kind, a, b))
            start = end
        return _joined(found)

    def messages(self) -> list[Message]:
        """Everything that moved between lanes, in order of sending."""
        found: list[Message] = []
        program, played = self._built.program, self._played
        for lane, ops in enumerate(program.ops):
            for at, op in enumerate(ops):
                if op[0] != TAKE:
                    continue
                now = self._list(lane)[program.labels[lane][at]]
                way = program.ways[program.way_of[op[1]]]
                assert now.value is not None and now.microbatch is not None
                name = now.value if now.kind is Kind.RECV_FORWARD else f"grad:{now.value}"
                found.append(
                    Message(
                        name,
                        now.microbatch,
                        way.source,
                        way.target,
                        played.sent[op[1]],
                        played.started[op[1]],
                        played.arrived[op[1]],
                        way.nbytes,
                    )
                )
        return sorted(found, key=lambda m: (m.sent, m.source, m.target))

    @property
    def setting(self) -> Setting:
        """What was simulated: stages with their costs, meshes, cluster."""
        return self._setting

    # -- inside -----------------------------------------------------------------------------

    def _list(self, lane: int) -> Sequence[Instruction]:
        return self._lists[self.lanes[lane].group]

    def _name(self, lane: int, position: int) -> str:
        return "OPTIMIZER" if position == OPTIMIZE else str(self._list(lane)[position])

    def _kind(self, lane: int, position: int) -> str:
        if position == OPTIMIZE:
            return "O"
        now = self._list(lane)[position]
        return now.kind.value if now.kind in COMPUTE else "G"

    def _op_spans(
        self, lane: int, at: int, start: float, end: float
    ) -> list[tuple[str, float, float]]:
        """What one operation is made of: (kind, from, to)."""
        program, played = self._built.program, self._played
        op = program.ops[lane][at]
        if op[0] == TAKE:
            handed = min(max(played.sent[op[1]], start), end)
            return _split(start, handed, end)
        if op[0] == AWAIT:
            return _split(start, max(played.met[op[1]][0], start), end)
        if op[0] == MEET:
            return _split(start, played.met[op[1]][0], end)
        if op[0] == DRAIN:
            return _split(start, min(max(played.complete[lane], start), end), end)
        return [(self._kind(lane, program.labels[lane][at]), start, end)]


def _split(start: float, handed: float, end: float) -> list[tuple[str, float, float]]:
    parts = [("wait", start, handed), ("comm", handed, end)]
    return [part for part in parts if part[2] > part[1]]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring spans of one instruction and kind as one."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last and (last.name, last.kind, last.end) == (span.name, span.kind, span.start):
            found[-1] = Span(span.name, span.kind, last.start, span.end)
        else:
            found.append(span)
    return found
