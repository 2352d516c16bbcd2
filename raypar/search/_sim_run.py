"""Plays a program: lanes go through their operations, messages and meetings take their time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from raypar.errors import ScheduleError
from raypar.search._sim_fluid import FluidClock
from raypar.search._sim_program import (
    AWAIT,
    DRAIN,
    JOIN,
    MEET,
    POST,
    TAKE,
    WORK,
    Program,
)

_NEVER = float("inf")


@dataclass
class Played:
    """When everything happened.

    Attributes:
        ends: Per lane and operation, when the lane left it; it entered when it left the one before
            (the first at 0), so that a wait is the duration of the operation that waited.
        sent: Message → when its SEND was reached.
        started: Message → when it got the link.
        arrived: Message → when it was there.
        joined_last: Meeting → the lane that joined last.
        met: Meeting → (when the last joined, when it got its turn, when it was over).
        complete: Per lane when everybody had joined the meeting that its DRAIN waited for last.
        step: When NORM was over on all lanes.
    """

    ends: list[list[float]]
    sent: list[float]
    started: list[float]
    arrived: list[float]
    joined_last: list[int]
    met: list[tuple[float, float, float]]
    complete: list[float]
    step: float


def play(program: Program) -> Played:
    """Plays one step.

    Raises:
        ScheduleError: The lists deadlock.
    """
    player = _Player(program)
    player.run()
    return player.result()


class _Player:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.clock = FluidClock(program.resources)
        n_lanes, n_messages = len(program.ops), len(program.way_of)
        self.at = [0] * n_lanes
        self.ends: list[list[float]] = [[] for _ in range(n_lanes)]
        self.sent = [_NEVER] * n_messages
        self.started = [_NEVER] * n_messages
        self.arrived = [_NEVER] * n_messages
        self.waiter = [-1] * n_messages
        # Messages of one pair of lanes go one after the other: per pair its queue.
        pairs: dict[tuple[int, int], int] = {}
        self.pair_of_way = [
            pairs.setdefault((way.source, way.target), len(pairs)) for way in program.ways
        ]
        self.lines: list[deque[int]] = [deque() for _ in pairs]
        self.missing = [set(meeting.lanes) for meeting in program.meetings]
        self.joined = [0.0] * len(program.meetings)
        self.joined_last = [-1] * len(program.meetings)
        self.met = [(_NEVER, _NEVER, _NEVER)] * len(program.meetings)
        self.queues: dict[int, deque[int]] = {}
        for number, meeting in enumerate(program.meetings):
            self.queues.setdefault(meeting.queue, deque()).append(number)
        self.in_meeting: dict[int, bool] = dict.fromkeys(self.queues, False)
        self.open = [0] * n_lanes  # meetings joined in the background and not over
        self.draining = [False] * n_lanes
        self.awaiting: dict[int, list[int]] = {}  # meeting → lanes that wait for it
        self.complete = [0.0] * n_lanes

    def run(self) -> None:
        """Plays until all lanes have ended."""
        for lane in range(len(self.program.ops)):
            self._go(lane)
        self.clock.run()
        stuck = [lane for lane, ops in enumerate(self.program.ops) if self.at[lane] < len(ops)]
        if stuck:
            places = ", ".join(
                f"lane {lane} at instruction {self.program.labels[lane][self.at[lane]]}"
                for lane in stuck[:8]
            )
            raise ScheduleError(
                f"the lists deadlock in simulation: {places}; check_lists() shows the grid"
            )

    def result(self) -> Played:
        """What was learned."""
        step = max((ends[-1] for ends in self.ends if ends), default=0.0)
        return Played(
            self.ends,
            self.sent,
            self.started,
            self.arrived,
            self.joined_last,
            self.met,
            self.complete,
            step,
        )

    def _go(self, lane: int) -> None:
        """Takes a lane on until it computes or waits."""
        ops, at, ends, now = self.program.ops[lane], self.at[lane], self.ends[lane], self.clock.now
        count = len(ops)
        while at < count:
            op = ops[at]
            code = op[0]
            if code == WORK:
                if op[1] > 0.0:
                    self.at[lane] = at
                    self.clock.begin(op[1], op[2], self._next, lane)
                    return
            elif code == POST:
                self._post(op[1], now)
            elif code == TAKE:
                there = self.arrived[op[1]]
                if there > now:
                    self.at[lane] = at
                    if there == _NEVER:
                        self.waiter[op[1]] = lane
                    else:
                        self.clock.at(there, self._next, lane)
                    return
            elif code == AWAIT:
                if self.met[op[1]][2] == _NEVER:
                    self.at[lane] = at
                    self.awaiting.setdefault(op[1], []).append(lane)
                    return
            elif code == DRAIN:
                if self.open[lane]:
                    self.at[lane] = at
                    self.draining[lane] = True
                    return
            else:
                self.at[lane] = at
                self.open[lane] += code == JOIN
                self._join(op[1], lane)
                if code == MEET:
                    return
            ends.append(now)
            at += 1
        self.at[lane] = at

    def _next(self, lane: int) -> None:
        """The operation that a lane stood at is over."""
        self.ends[lane].append(self.clock.now)
        self.at[lane] += 1
        self._go(lane)

    # -- messages ---------------------------------------------------------------------------

    def _post(self, message: int, now: float) -> None:
        self.sent[message] = now
        number = self.program.way_of[message]
        line = self.lines[self.pair_of_way[number]]
        line.append(message)
        if len(line) == 1:
            self._transfer(message)

    def _transfer(self, message: int) -> None:
        way = self.program.ways[self.program.way_of[message]]
        self.started[message] = self.clock.now
        self.clock.begin(way.work, way.uses, self._transferred, message)

    def _transferred(self, message: int) -> None:
        number = self.program.way_of[message]
        way = self.program.ways[number]
        there = self.clock.now + way.latency + way.after
        self.arrived[message] = there
        line = self.lines[self.pair_of_way[number]]
        line.popleft()
        if line:
            self._transfer(line[0])
        waiter = self.waiter[message]
        if waiter >= 0:
            self.clock.at(there, self._next, waiter)

    # -- meetings ---------------------------------------------------------------------------

    def _join(self, meeting: int, lane: int) -> None:
        missing = self.missing[meeting]
        missing.remove(lane)
        if not missing:
            self.joined[meeting] = self.clock.now
            self.joined_last[meeting] = lane
            self._hold(self.program.meetings[meeting].queue)

    def _hold(self, queue: int) -> None:
        """Begins the next meeting of a queue if all have joined."""
        line = self.queues[queue]
        if not line or self.in_meeting[queue] or self.missing[line[0]]:
            return
        meeting = line.popleft()
        self.in_meeting[queue] = True
        self.met[meeting] = (self.joined[meeting], self.clock.now, _NEVER)
        work = self.program.meetings[meeting].work
        self.clock.begin(work.seconds, work.uses, self._over, meeting)

    def _over(self, meeting: int) -> None:
        found = self.program.meetings[meeting]
        joined, began, _ = self.met[meeting]
        self.met[meeting] = (joined, began, self.clock.now)
        self.in_meeting[found.queue] = False
        self._hold(found.queue)
        first = found.lanes[0]
        if self.program.ops[first][self.at[first]] == (MEET, meeting):
            for lane in found.lanes:
                self._next(lane)
            return
        for lane in found.lanes:
            self.open[lane] -= 1
            if self.draining[lane] and not self.open[lane]:
                self.draining[lane] = False
                self.complete[lane] = joined
                self._next(lane)
        for lane in self.awaiting.pop(meeting, ()):
            self._next(lane)
