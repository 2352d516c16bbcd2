"""Where the time of a step went, on every rank.

A step of the run lasts as long as its slowest rank, ``step_s``. On each rank it is made of these
parts, which exclude each other and add up to ``step_s``:

* ``compute``: forward and backward programs, with the collectives inside them;
* ``communication``: handing over what is sent; waiting for a message from when its sender had
  handed it over, or for parameters that other ranks' optimizers changed (ZeRO); in the norm over
  all ranks (where gradient sums end as well) from when the last rank had come to it; waiting until
  all sends are through;
* ``bubble``: waiting for somebody who has not sent yet, or not come to the norm yet;
* ``data``: waiting for the step's inputs;
* ``optimizer``: the update;
* ``other``: the rest: counting the batch, freeing, the interpreter itself, and by how much the
  rank's step was shorter than the slowest one's.

Times are those of the host. A GPU works behind its host's back: what it still computes when the
host has told it everything shows where the host waits for it, mostly in ``communication``.

Clocks: ranks of one node share the system's monotonic clock. Clocks of other nodes are set by the
end of the norm, which all ranks leave together: the median of the last steps' differences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind
from raypar.stages.spec import RankSpec, StepReport

PARTS = ("compute", "communication", "bubble", "data", "optimizer", "other")
"""What a step is made of, in the order of the columns of `Breakdown.parts`."""
_COMPUTE, _COMM, _BUBBLE, _DATA, _OPTIMIZER, _OTHER = range(len(PARTS))
_PART = {
    **dict.fromkeys(COMPUTE, _COMPUTE),
    **dict.fromkeys(RECV | SEND | {Kind.NORM, Kind.GRAD_SYNC}, _COMM),
    Kind.OPTIMIZER: _OPTIMIZER,
}
_KEPT = 31  # differences of clocks of which the median is taken


@dataclass(frozen=True, slots=True)
class RankLists:
    """Who does what, as far as times need it.

    Attributes:
        lists: Instruction list of every rank group.
        ranks: (rank group, replica) of every rank.
        nodes: Node of every rank; ranks of one node share a clock.
    """

    lists: tuple[tuple[Instruction, ...], ...]
    ranks: tuple[tuple[int, int], ...]
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, specs: Sequence[RankSpec], nodes: Sequence[str]) -> RankLists:
        """Those of a run: its specs by rank, and the node of every rank."""
        found = {spec.group: spec.instructions for spec in specs}
        return cls(
            tuple(tuple(found[group]) for group in sorted(found)),
            tuple((spec.group, spec.replica) for spec in specs),
            tuple(nodes),
        )

    @property
    def starts(self) -> list[int]:
        """Where each rank's stamps begin in the stamps of all ranks in a row, and their number.

        A rank has a stamp for the beginning, for the end of each instruction, and for the end.
        """
        found = [0]
        for group, _ in self.ranks:
            found.append(found[-1] + len(self.lists[group]) + 2)
        return found


@dataclass(frozen=True, slots=True)
class Meetings:
    """Where ranks wait for each other, as indices into the stamps of all ranks in a row.

    Attributes:
        takes: ``[receives]``: the stamp at which a rank begins to wait for a message.
        takers: ``[receives]``: its rank.
        senders: ``[receives, ranks]``: stamps at which the message was handed over; rows repeat a
            member where fewer ranks send.
        norms: ``[ranks]``: the stamp at which each rank comes to the norm; empty without norms.
    """

    takes: np.ndarray
    takers: np.ndarray
    senders: np.ndarray
    norms: np.ndarray


def meetings_of(lists: RankLists) -> Meetings:
    """Every receive with its sends, and the norm.

    Replica r of a stage talks to replica r of the other; where a stage has several ranks for each
    replica, the last of them counts.
    """
    starts = lists.starts
    sent: dict[tuple[int, tuple[str, str, int, int, int]], list[int]] = {}
    norms = []
    for rank, (group, replica) in enumerate(lists.ranks):
        for at, now in enumerate(lists.lists[group], start=starts[rank]):
            if now.kind in SEND and now.message is not None:
                sent.setdefault((replica, now.message), []).append(at + 1)
            elif now.kind is Kind.NORM:
                norms.append(at)
    rows: list[tuple[int, int, list[int]]] = []
    for rank, (group, replica) in enumerate(lists.ranks):
        for at, now in enumerate(lists.lists[group], start=starts[rank]):
            if now.kind in RECV and now.message is not None:
                rows.append((at, rank, sent[replica, now.message]))
    width = max((len(row[2]) for row in rows), default=1)
    senders = [row[2] + row[2][:1] * (width - len(row[2])) for row in rows]
    return Meetings(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array(senders, dtype=np.int64).reshape(len(rows), width),
        np.array(norms if len(norms) == len(lists.ranks) else [], dtype=np.int64),
    )


class Clocks:
    """What to take off each rank's clock so that it reads as rank 0's node does.

    Args:
        lists: The ranks and their nodes.
        meetings: Where they meet.
    """

    def __init__(self, lists: RankLists, meetings: Meetings) -> None:
        names = list(dict.fromkeys(lists.nodes))
        self._node = np.array([names.index(node) for node in lists.nodes])
        self._norms = meetings.norms + 1
        self._seen: deque[np.ndarray] = deque(maxlen=_KEPT)
        self._several = len(names) > 1 and len(meetings.norms) > 0
        self.offsets = np.zeros(len(lists.nodes))

    def learn(self, stamps: np.ndarray) -> None:
        """Looks at one more step's stamps, of all ranks in a row."""
        if not self._several:
            return
        left = stamps[self._norms]
        mean = np.bincount(self._node, left) / np.bincount(self._node)
        self._seen.append(mean - mean[0])
        self.offsets = np.median(np.array(self._seen), axis=0)[self._node]


class Breakdown:
    """Takes steps apart; see the module for what the parts are.

    Args:
        lists: The ranks and their instruction lists.
    """

    def __init__(self, lists: RankLists) -> None:
        self.lists = lists
        self.meetings = meetings_of(lists)
        self.clocks = Clocks(lists, self.meetings)
        self._starts = np.array(lists.starts)
        self._bins = self._bin_of_each_gap()
        self._shift = np.repeat(np.arange(len(lists.ranks)), np.diff(self._starts))

    def _bin_of_each_gap(self) -> np.ndarray:
        """For every two neighbouring stamps the (rank, part) that the time between them is."""
        ranks, parts = len(self.lists.ranks), len(PARTS)
        found: list[int] = []
        for rank, (group, _) in enumerate(self.lists.ranks):
            own = [_PART.get(now.kind, _OTHER) for now in self.lists.lists[group]]
            found += [rank * parts + part for part in [*own, _COMM]]
            found.append(ranks * parts)  # from one rank's last stamp to the next one's first
        return np.array(found[:-1])

    def stamps(self, reports: Sequence[StepReport]) -> np.ndarray | None:
        """All ranks' stamps in a row, as rank 0's clock tells them; None where some are missing."""
        raw = b"".join(report.stamps for report in reports)
        found = np.frombuffer(raw)
        if len(reports) != len(self.lists.ranks) or len(found) != self._starts[-1]:
            return None
        self.clocks.learn(found)
        return found - self.clocks.offsets[self._shift]

    def parts(self, reports: Sequence[StepReport], step_s: float) -> np.ndarray:
        """``[ranks, parts]``: seconds of every part of `PARTS` on every rank.

        Where ranks give no stamps, all waiting counts as communication.

        Args:
            reports: Of every rank, by rank.
            step_s: Seconds of the step; every row adds up to it.
        """
        stamps = self.stamps(reports)
        found = _without_stamps(reports) if stamps is None else self.of_stamps(stamps)
        if stamps is not None:
            awaited = [report.awaited for report in reports]
            found[:, _COMPUTE] -= awaited
            found[:, _COMM] += awaited
        found[:, _DATA] = [report.seconds.get("data", 0.0) for report in reports]
        found[:, _OTHER] = 0.0
        found[:, _OTHER] = np.maximum(step_s - found.sum(axis=1), 0.0)
        return found

    def of_stamps(self, stamps: np.ndarray) -> np.ndarray:
        """``[ranks, parts]``: what stamps alone tell, in seconds: ``data`` is not in them.

        Args:
            stamps: Of all ranks in a row, by one clock; ``other`` is what instructions of other
                kinds take.
        """
        ranks, parts = len(self.lists.ranks), len(PARTS)
        sums = np.bincount(self._bins, np.diff(stamps), minlength=ranks * parts + 1)
        found: np.ndarray = sums[:-1].reshape(ranks, parts)
        idle = np.zeros(ranks)
        meet = self.meetings
        if len(meet.takes):
            handed = stamps[meet.senders].max(axis=1)
            early = np.clip(handed, stamps[meet.takes], stamps[meet.takes + 1])
            idle += np.bincount(meet.takers, early - stamps[meet.takes], minlength=ranks)
        if len(meet.norms):
            came = stamps[meet.norms]
            idle += np.clip(came.max(), came, stamps[meet.norms + 1]) - came
        found[:, _COMM] -= idle
        found[:, _BUBBLE] += idle
        return found


def _without_stamps(reports: Sequence[StepReport]) -> np.ndarray:
    found = np.zeros((len(reports), len(PARTS)))
    for rank, report in enumerate(reports):
        seconds = report.seconds
        found[rank, _COMPUTE] = seconds.get("compute", 0.0)
        found[rank, _COMM] = seconds.get("recv", 0.0) + seconds.get("sync", 0.0)
        found[rank, _OPTIMIZER] = seconds.get("optimizer", 0.0)
    return found


def busiest(parts: np.ndarray) -> int:
    """The rank that has most to do itself: the one that the others wait for, if any."""
    own: np.ndarray = parts[:, _COMPUTE] + parts[:, _OPTIMIZER] + parts[:, _DATA]
    return int(own.argmax())
