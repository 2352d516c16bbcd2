"""The critical path of a step: the chain of work and transfers that its length is made of."""

from __future__ import annotations

from dataclasses import dataclass

from raypar.search._sim_build import Built
from raypar.search._sim_program import AWAIT, DRAIN, JOIN, MEET, POST, TAKE, WORK
from raypar.search._sim_run import Played


@dataclass(frozen=True, slots=True)
class Link:
    """One piece of the path.

    Attributes:
        lane: The lane that works, or that a message goes to.
        position: The instruction, as an index of the lane's list; negative for the optimizer, which
            begins a step.
        seconds: Its share of the step.
        what: ``work``, ``transfer``, ``sync`` (gradients, updated parameters) or ``norm``.
    """

    lane: int
    position: int
    seconds: float
    what: str


def critical_path(built: Built, played: Played) -> list[Link]:
    """From the beginning of the step to its end; the seconds add up to the step.

    It is walked backwards: whoever ended a wait comes before it.
    """
    if not played.ends:
        return []
    walker = _Walker(built, played)
    return walker.walk()


class _Walker:
    def __init__(self, built: Built, played: Played) -> None:
        self.program, self.played = built.program, played
        self.sender: dict[int, tuple[int, int]] = {}
        self.joiner: dict[tuple[int, int], int] = {}
        for lane, ops in enumerate(self.program.ops):
            for at, op in enumerate(ops):
                if op[0] == POST:
                    self.sender[op[1]] = (lane, at)
                elif op[0] in (JOIN, MEET):
                    self.joiner[op[1], lane] = at
        self.path: list[Link] = []

    def walk(self) -> list[Link]:
        """The path, first piece first."""
        lane = max(range(len(self.played.ends)), key=lambda i: self.played.ends[i][-1])
        at = len(self.program.ops[lane]) - 1
        while at >= 0:
            lane, at = self._before(lane, at)
        merged: list[Link] = []
        for link in reversed(self.path):
            last = merged[-1] if merged else None
            if last and (last.lane, last.position, last.what) == (
                link.lane,
                link.position,
                link.what,
            ):
                merged[-1] = Link(link.lane, link.position, last.seconds + link.seconds, link.what)
            else:
                merged.append(link)
        return merged

    def _before(self, lane: int, at: int) -> tuple[int, int]:
        """Notes an operation that ended when the path goes on, and gives the one before it."""
        op = self.program.ops[lane][at]
        ends = self.played.ends[lane]
        start = ends[at - 1] if at else 0.0
        waited = ends[at] - start
        if op[0] == WORK or waited <= 0.0:
            self._note(lane, at, waited, "work")
            return lane, at - 1
        if op[0] == TAKE:
            self._note(lane, at, ends[at] - self.played.sent[op[1]], "transfer")
            sender, posted = self.sender[op[1]]
            return sender, posted - 1
        if op[0] == DRAIN:
            return self._through_sync(lane, at)
        if op[0] == AWAIT:
            return self._through_meeting(lane, at, op[1], "sync")
        return self._through_meeting(lane, at, op[1], "norm")

    def _through_sync(self, lane: int, at: int) -> tuple[int, int]:
        """Back from the wait for gradients to the lane that the last of them waited for."""
        mine = [m for (m, who) in self.joiner if who == lane]
        mine = [m for m in mine if self.program.ops[lane][-1] != (MEET, m)]
        meeting = max(mine, key=lambda m: self.played.met[m][2])
        return self._through_meeting(lane, at, meeting, "sync")

    def _through_meeting(self, lane: int, at: int, meeting: int, what: str) -> tuple[int, int]:
        joined = self.played.met[meeting][0]
        self._note(lane, at, self.played.ends[lane][at] - joined, what)
        last = self.played.joined_last[meeting]
        return last, self.joiner[meeting, last] - 1

    def _note(self, lane: int, at: int, seconds: float, what: str) -> None:
        if seconds > 0.0:
            self.path.append(Link(lane, self.program.labels[lane][at], seconds, what))
