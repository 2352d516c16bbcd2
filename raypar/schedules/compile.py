"""Plan → instruction lists: the only compiler of them.

The conventions that the interpreter, the checker and the simulators share
--------------------------------------------------------------------------
Every rank group executes one list. It keeps values under (name, microbatch), whichever of its
stages they belong to:

* ``x``: the activation of edge ``x``. It appears when the source stage's forward ran here, or by
  RECV_FORWARD. Every target stage on the rank group reads the same one.
* ``grad:x``: the sum of the gradients of ``x`` that have arrived so far. The backward (or input
  half) of a target stage **adds** its gradient to it, and so does RECV_BACKWARD; the first of
  them makes it.
* ``saved``, per (stage, microbatch): what forward keeps for backward. F makes it, I may replace
  it by what W needs; B or W drops it. No FREE is written for it.

Transfers. A value goes **once to every rank group** that holds targets and not the source: the
message is named after the *lowest* target stage there (``0SF3[x>2]`` and ``2RF3[x<0]``), and the
others read what it left. Gradients go back the same way: on each such rank group the target stages
sum into ``grad:x``, and after the last of them one message returns (``2SB3[x>0]`` and
``0RB3[x<2]``). The source's rank group adds what comes from each of them, and what its own
targets computed, before the source's backward reads the sum. Edges that are not differentiable
have no gradient. `Instruction.message` identifies a message, equal on both sides and sent once a
step: ranks match by it, since two ranks may send in another order than the peer receives in.

Around one compute instruction: the RECVs it needs, the compute, the SENDs of what it made
complete, then FREE of every value that is not needed any more on this rank group. A FREE only
drops the rank's reference: a transfer under way keeps its own. Received values can be posted
early; a RECV is the place where the value must be there.

One list is: GLOBALS; the compute with all around it; SYNC per stage, in the order in which their
last backward ends (its buckets may be sent from that moment on); NORM; OPTIMIZER. A list that only
evaluates ends behind its last forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.schedules.base import Action, Placement, Schedule, check_io, check_orders
from raypar.schedules.instructions import Instruction, Kind
from raypar.schedules.io import Edge, StageIO
from raypar.schedules.registry import get_schedule

GRAD = "grad:"


@dataclass(frozen=True, slots=True)
class Route:
    """How one edge travels.

    Attributes:
        edge: The edge.
        home: The source's rank group.
        heads: For every other rank group with targets, the lowest target stage there: the one
            that its messages are named after.
        readers: For every rank group with targets (the source's included), the targets there.
    """

    edge: Edge
    home: int
    heads: dict[int, int]
    readers: dict[int, tuple[int, ...]]


def routes(io: StageIO) -> tuple[Route, ...]:
    """The route of every edge, in the order of `io.edges`."""
    result = []
    for edge in io.edges:
        readers: dict[int, tuple[int, ...]] = {}
        for target in edge.targets:
            rank = io.rank_of[target]
            readers[rank] = (*readers.get(rank, ()), target)
        home = io.rank_of[edge.source]
        heads = {rank: targets[0] for rank, targets in readers.items() if rank != home}
        result.append(Route(edge, home, heads, readers))
    return tuple(result)


def compile_schedule(
    schedule: str | Schedule, io: StageIO, microbatches: int
) -> list[list[Instruction]]:
    """Compiles one step into instruction lists.

    Args:
        schedule: A registered name (see `raypar.schedules.registry`), or a schedule itself.
        io: The plan's stages.
        microbatches: M.

    Returns:
        One list per rank group; see the module's text for the conventions. Run
        `raypar.schedules.check.check_lists` on it before anything is executed.

    Raises:
        ScheduleError: Unknown name, a plan this schedule cannot run, a malformed `io`, or a
            schedule that breaks its contract.
    """
    chosen = get_schedule(schedule) if isinstance(schedule, str) else schedule
    check_io(io)
    placement = Placement.of(io.rank_of)
    chosen.check(placement, microbatches)
    orders = chosen.orders(placement, microbatches, io.splits)
    check_orders(chosen.name, orders, placement, microbatches, trains=chosen.trains)
    ways = routes(io)
    return [
        _Writer(rank, io, ways).write(order, chosen.trains) for rank, order in enumerate(orders)
    ]


class _Writer:
    """Writes the list of one rank group."""

    def __init__(self, rank: int, io: StageIO, ways: Sequence[Route]) -> None:
        self.rank = rank
        self.out: list[Instruction] = []
        self.inputs: list[list[Route]] = [[] for _ in range(io.n_stages)]
        self.outputs: list[list[Route]] = [[] for _ in range(io.n_stages)]
        for way in ways:
            self.outputs[way.edge.source].append(way)
            for target in way.edge.targets:
                self.inputs[target].append(way)
        # (edge, microbatch) → target stages here that have not run yet, forward and backward.
        self.unread: dict[tuple[str, int], int] = {}
        self.unsummed: dict[tuple[str, int], int] = {}

    def write(self, order: Sequence[Action], trains: bool) -> list[Instruction]:
        self.out.append(Instruction(Kind.GLOBALS))
        finished: dict[int, None] = {}
        for kind, stage, mb in order:
            if kind is Kind.FORWARD:
                self._forward(stage, mb)
            elif kind is Kind.BACKWARD_WEIGHT:
                self._add(kind, stage, mb)
            else:
                self._backward(kind, stage, mb)
            if kind is Kind.BACKWARD or kind is Kind.BACKWARD_WEIGHT:
                finished.pop(stage, None)
                finished[stage] = None
        self.out += [Instruction(Kind.GRAD_SYNC, stage) for stage in finished]
        if trains:
            self.out += [Instruction(Kind.NORM), Instruction(Kind.OPTIMIZER)]
        return self.out

    def _add(
        self, kind: Kind, stage: int, mb: int, value: str | None = None, peer: int | None = None
    ) -> None:
        self.out.append(Instruction(kind, stage, mb, value, peer))

    def _forward(self, stage: int, mb: int) -> None:
        dead: list[str] = []
        for way in self.inputs[stage]:
            key = (way.edge.name, mb)
            left = self.unread.get(key)
            if left is None:
                left = len(way.readers[self.rank])
                if way.home != self.rank:
                    head = way.heads[self.rank]
                    self._add(Kind.RECV_FORWARD, head, mb, way.edge.name, way.edge.source)
            self.unread[key] = left - 1
            if left == 1:
                dead.append(way.edge.name)
        self._add(Kind.FORWARD, stage, mb)
        for way in self.outputs[stage]:
            for head in way.heads.values():
                self._add(Kind.SEND_FORWARD, stage, mb, way.edge.name, head)
            if self.rank not in way.readers:
                dead.append(way.edge.name)
        for name in dead:
            self._add(Kind.FREE, stage, mb, name)

    def _backward(self, kind: Kind, stage: int, mb: int) -> None:
        used = [way for way in self.outputs[stage] if way.edge.differentiable]
        for way in used:
            for head in way.heads.values():
                self._add(Kind.RECV_BACKWARD, stage, mb, way.edge.name, head)
        self._add(kind, stage, mb)
        complete: list[Route] = []
        for way in self.inputs[stage]:
            if not way.edge.differentiable or way.home == self.rank:
                continue
            key = (way.edge.name, mb)
            left = self.unsummed.get(key, len(way.readers[self.rank]))
            self.unsummed[key] = left - 1
            if left == 1:
                complete.append(way)
                head = way.heads[self.rank]
                self._add(Kind.SEND_BACKWARD, head, mb, way.edge.name, way.edge.source)
        for way in used:
            self._add(Kind.FREE, stage, mb, GRAD + way.edge.name)
        for way in complete:
            self._add(Kind.FREE, way.heads[self.rank], mb, GRAD + way.edge.name)
