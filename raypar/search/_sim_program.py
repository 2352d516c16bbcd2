"""Instruction lists as the simulator plays them: per lane a list of timed operations.

A *lane* is a rank group, or one replica of it: ranks that go in step. Conventions of the lists are
those of `raypar.schedules.compile`; what travels beside compute is that of the interpreter:

* a message leaves when its SEND is reached, behind earlier messages of the same pair of lanes;
* parameters that are stored in parts leave for all ranks when the optimizer is through, stage by
  stage in the background, and the first forward of a stage waits for its own;
* gradient buckets leave one by one while the last backward of their stage goes on, one after the
  other in the background, and NORM waits for them;
* gradients of which no rank keeps the whole (ZeRO-2) leave after every microbatch: those of a stage
  only when those of the microbatch before are through;
* gradients of a parameter that several rank groups hold are summed once all of them have them;
* NORM is a meeting of all lanes.

Since NORM is a barrier, one step from NORM to NORM is the period of any run of steps: a lane's
list begins with the optimizer of the step before, and ends with NORM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind
from raypar.search._sim_fluid import Uses

WORK, POST, TAKE, JOIN, MEET, DRAIN, AWAIT = range(7)
"""Operations: compute; send; receive; join a meeting in the background; wait in one; wait for
those joined in the background; wait for one of them."""

OPTIMIZE = -1
"""Label of the operations that belong to no instruction of the list."""

Op = tuple[Any, ...]
"""(WORK, seconds, uses), (POST, message), (TAKE, message), (DRAIN,); JOIN, MEET and AWAIT with
their meeting."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Work alone, in seconds, and what it uses meanwhile."""

    seconds: float
    uses: Uses = ()


@dataclass(frozen=True, slots=True)
class Way:
    """How one value travels from lane to lane.

    Attributes:
        source: Sending lane.
        target: Receiving lane.
        work: Seconds on the link, alone.
        latency: Seconds from the end of the work to the arrival; nobody waits in line for it.
        uses: What it uses meanwhile.
        nbytes: Bytes of one message, all ranks of the lanes together.
        after: Seconds that the receivers still need after the arrival (they share what came).
    """

    source: int
    target: int
    work: float
    latency: float
    uses: Uses
    nbytes: int
    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """A collective over lanes.

    Attributes:
        lanes: Who joins.
        work: Its time, from when the last has joined.
        queue: Meetings of one queue follow each other, in the order of their numbers.
    """

    lanes: tuple[int, ...]
    work: Timed
    queue: int


@dataclass(frozen=True)
class LaneTimes:
    """What the operations of one lane cost.

    Attributes:
        group: Its rank group.
        replica: Its replica, or 0 where one lane stands for all.
        compute: (stage, kind) → one microbatch, collectives inside included.
        optimizer: The optimizer step.
        gather: Stage → the time in which its parameters are gathered, once a step.
        globals: The counts of the whole batch.
        buckets: Stage → its gradient buckets' times, once a step.
        rounds: Stage → the same of what leaves after every microbatch.
        overhead: Seconds around every instruction that computes or moves something.
    """

    group: int
    replica: int
    compute: Mapping[tuple[int, Kind], Timed]
    optimizer: Timed = Timed(0.0)
    gather: Mapping[int, Timed] = field(default_factory=dict)
    globals: Timed = Timed(0.0)
    buckets: Mapping[int, tuple[Timed, ...]] = field(default_factory=dict)
    rounds: Mapping[int, tuple[Timed, ...]] = field(default_factory=dict)
    overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class Tied:
    """The sum of gradients over rank groups that share parameters.

    Attributes:
        stages: Stages that deliver them.
        work: Time of the sum.
    """

    stages: tuple[int, ...]
    work: Timed


@dataclass
class Program:
    """All lanes, ready to play.

    Attributes:
        ops: Per lane its operations.
        labels: Per lane and operation the instruction it belongs to: its index in the list.
        last_op: Per lane and instruction the last operation that had begun by then.
        ways: How messages travel.
        way_of: Message → its way.
        message_of: Per lane: operation → message, for POST and TAKE.
        meetings: Collectives over lanes.
        resources: How many shared resources there are.
    """

    ops: list[list[Op]]
    labels: list[list[int]]
    last_op: list[list[int]]
    ways: list[Way]
    way_of: list[int]
    meetings: list[Meeting]
    resources: int


def compile_program(
    lists: Sequence[Sequence[Instruction]],
    lanes: Sequence[LaneTimes],
    ways: Mapping[tuple[str, str, int, int, int], Way],
    norm: Timed,
    tied: Sequence[Tied] = (),
    resources: int = 0,
) -> Program:
    """Puts instruction lists and times together.

    Args:
        lists: One list per rank group.
        lanes: The lanes; those of one rank group all play its list.
        ways: (``F`` or ``B``, edge, sending lane, receiving lane, replica) → how it travels.
        norm: The meeting of all lanes at the end.
        tied: Gradients that are summed over rank groups.
        resources: How many shared resources the uses speak of.
    """
    return _Compiler(lists, lanes, ways, norm, tied, resources).compile()


class _Compiler:
    def __init__(
        self,
        lists: Sequence[Sequence[Instruction]],
        lanes: Sequence[LaneTimes],
        ways: Mapping[tuple[str, str, int, int, int], Way],
        norm: Timed,
        tied: Sequence[Tied],
        resources: int,
    ) -> None:
        self.lists, self.lanes = lists, lanes
        self.group_of_stage = {
            now.stage: group
            for group, program in enumerate(lists)
            for now in program
            if now.kind is Kind.FORWARD and now.stage is not None
        }
        self.lanes_of: dict[int, list[int]] = {}
        for index, lane in enumerate(lanes):
            self.lanes_of.setdefault(lane.group, []).append(index)
        self.ways = list(ways.values())
        self.way_number = {key: number for number, key in enumerate(ways)}
        self.messages: dict[tuple[Any, ...], int] = {}
        self.way_of: list[int] = []
        self.meetings: list[Meeting] = []
        self.resources = resources
        # First of all in their groups' queues: they are complete before anything else is.
        self.gathers = {group: self._gathers(group) for group in self.lanes_of}
        self.bucket_meetings = {group: self._buckets(group) for group in self.lanes_of}
        self.tied = [self._tied(one) for one in tied]
        self.norm = self._meeting(Meeting(tuple(range(len(lanes))), norm, -1))

    def _meeting(self, meeting: Meeting) -> int:
        self.meetings.append(meeting)
        return len(self.meetings) - 1

    def _gathers(self, group: int) -> dict[int, int]:
        """Stage → meeting in which its parameters are gathered, in the order of first forwards."""
        own = tuple(self.lanes_of[group])
        times = self.lanes[own[0]].gather
        stages = dict.fromkeys(now.stage for now in self.lists[group] if now.kind is Kind.FORWARD)
        return {
            stage: self._meeting(Meeting(own, times[stage], group))
            for stage in stages
            if stage is not None and stage in times and times[stage].seconds > 0.0
        }

    def _buckets(self, group: int) -> dict[int, list[int]]:
        """Position of a backward → meetings of its gradient buckets: of all replicas of the group.

        They are numbered in the order in which the backwards complete them, which is that of the
        interpreter: the first of a queue never waits for a bucket that is filled later.
        """
        own = tuple(self.lanes_of[group])
        first = self.lanes[own[0]]
        found: dict[int, list[int]] = {}
        delivered = _delivering(self.lists[group], first)
        final = {stage: position for position, stage in delivered.items()}
        for position, stage in delivered.items():
            times = first.rounds.get(stage, ())
            if final[stage] == position:
                times = (*times, *first.buckets.get(stage, ()))
            elif times:  # leaves as one: only how long it takes holds others up
                times = (Timed(sum(t.seconds for t in times), times[0].uses),)
            if times:
                found[position] = [self._meeting(Meeting(own, t, group)) for t in times]
        return found

    def _tied(self, one: Tied) -> tuple[int, dict[int, set[int]]]:
        """(meeting, rank group → its stages that deliver)."""
        parts: dict[int, set[int]] = {}
        for stage in one.stages:
            parts.setdefault(self.group_of_stage[stage], set()).add(stage)
        members = tuple(lane for group in sorted(parts) for lane in self.lanes_of[group])
        # Its own queue: it must not hold up buckets that are complete earlier.
        return self._meeting(Meeting(members, one.work, -2 - len(self.meetings))), parts

    def compile(self) -> Program:
        """All lanes."""
        parts = [self._lane(index, lane) for index, lane in enumerate(self.lanes)]
        return Program(
            [ops for ops, _, _ in parts],
            [labels for _, labels, _ in parts],
            [last for _, _, last in parts],
            self.ways,
            self.way_of,
            self.meetings,
            self.resources,
        )

    def _lane(self, index: int, lane: LaneTimes) -> tuple[list[Op], list[int], list[int]]:
        program = self.lists[lane.group]
        work = {key: (WORK, t.seconds + lane.overhead, t.uses) for key, t in lane.compute.items()}
        final = {stage: position for position, stage in _delivering(program, lane).items()}
        under_way: dict[int, int] = {}  # stage → the last meeting of its gradients' last round
        waiting = [(meeting, set(p.get(lane.group, ()))) for meeting, p in self.tied]
        awaited = dict(self.gathers[lane.group])
        ops: list[Op] = [(WORK, lane.optimizer.seconds, lane.optimizer.uses)]
        ops += [(JOIN, meeting) for meeting in awaited.values()]
        labels, last = [OPTIMIZE] * len(ops), []
        for position, now in enumerate(program):
            kind = now.kind
            if kind in COMPUTE:
                assert now.stage is not None
                op = work[now.stage, kind]
                if kind is Kind.FORWARD and now.stage in awaited:
                    ops.append((AWAIT, awaited.pop(now.stage)))
                leaving = self.bucket_meetings[lane.group].get(position, [])
                ops += self._leaving(op, leaving, under_way.get(now.stage))
                if leaving and now.stage in lane.rounds:
                    under_way[now.stage] = leaving[-1]
                if final.get(now.stage) == position:
                    for meeting, stages in waiting:
                        if now.stage in stages:
                            stages.remove(now.stage)
                            ops += [] if stages else [(JOIN, meeting)]
            elif kind in SEND:
                ops.append((POST, self._message(now, index, lane)))
            elif kind in RECV:
                ops.append((TAKE, self._message(now, index, lane)))
            elif kind is Kind.GLOBALS:
                ops.append((WORK, lane.globals.seconds, lane.globals.uses))
            elif kind is Kind.NORM:
                ops += [(DRAIN,), (MEET, self.norm)]
            labels += [position] * (len(ops) - len(labels))
            last.append(len(ops) - 1)
        return ops, labels, last

    def _leaving(self, op: Op, meetings: Sequence[int], before: int | None) -> list[Op]:
        """A backward: after every part of it one bucket is complete.

        Buckets that leave in every microbatch wait for those of the one `before`.
        """
        if not meetings:
            return [op]
        part = (WORK, op[1] / len(meetings), op[2])
        ops = [each for meeting in meetings for each in (part, (JOIN, meeting))]
        return ops if before is None else [part, (AWAIT, before), *ops[1:]]

    def _message(self, now: Instruction, index: int, lane: LaneTimes) -> int:
        assert now.peer is not None and now.message is not None
        key = (*now.message, lane.replica)
        known = self.messages.get(key)
        if known is None:
            other = self._peer(self.group_of_stage[now.peer], lane.replica)
            ends = (other, index) if now.kind in RECV else (index, other)
            known = self.messages[key] = len(self.way_of)
            way, value = now.message[0], now.message[1]
            self.way_of.append(self.way_number[way, value, *ends, lane.replica])
        return known

    def _peer(self, group: int, replica: int) -> int:
        own = self.lanes_of[group]
        return own[replica] if len(own) > 1 else own[0]


def _delivering(program: Sequence[Instruction], lane: LaneTimes) -> dict[int, int]:
    """Position → stage of every instruction that delivers gradients of parameters.

    These are backwards and weight halves, or, where the weight half has nothing to do, input
    halves. The last one of a stage completes its gradients.
    """
    found: dict[int, int] = {}
    for position, now in enumerate(program):
        if now.kind not in COMPUTE or now.kind is Kind.FORWARD or now.stage is None:
            continue
        if now.kind is not Kind.BACKWARD:
            empty = lane.compute[now.stage, Kind.BACKWARD_WEIGHT].seconds <= 0.0
            if empty is (now.kind is Kind.BACKWARD_WEIGHT):
                continue
        found[position] = now.stage
    return found
