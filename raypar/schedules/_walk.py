"""The walk of `raypar.schedules.check`: what each instruction asks of its rank group's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from raypar.errors import ScheduleError
from raypar.schedules._walk_state import Rank, grid
from raypar.schedules.compile import GRAD, Route, routes
from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind
from raypar.schedules.io import StageIO


class Walk:
    """The walk behind `check_lists`; `ranks` and `peaks` hold what it learned."""

    def __init__(
        self,
        lists: Sequence[Sequence[Instruction]],
        io: StageIO,
        microbatches: int,
        *,
        trains: bool = True,
    ) -> None:
        self.trains = trains
        self.once = (Kind.GLOBALS, Kind.NORM, Kind.OPTIMIZER) if trains else (Kind.GLOBALS,)
        self.io = io
        self.microbatches = microbatches
        n_ranks = max(io.rank_of, default=-1) + 1
        self.ranks = [
            Rank(r, lst, tuple(s for s, g in enumerate(io.rank_of) if g == r))
            for r, lst in enumerate(lists)
        ]
        if len(lists) != n_ranks:
            raise ScheduleError(f"{len(lists)} instruction lists for {n_ranks} rank groups")
        for rank in self.ranks:
            rank.counts = [0] * len(rank.stages)
            rank.note()
        self.ways = {way.edge.name: way for way in routes(io)}
        self.inputs: list[list[Route]] = [[] for _ in range(io.n_stages)]
        self.outputs: list[list[Route]] = [[] for _ in range(io.n_stages)]
        for way in self.ways.values():
            self.outputs[way.edge.source].append(way)
            for target in way.edge.targets:
                self.inputs[target].append(way)
        self.forwards = [0] * io.n_stages
        self.backwards: dict[tuple[int, int], Kind] = {}
        self.finished = [0] * io.n_stages
        self.peaks = [0] * io.n_stages
        # Message → whether it was received. A message is sent once a step.
        self.messages: dict[tuple[str, str, int, int], bool] = {}

    def run(self) -> None:
        """Walks until every list has ended; raises ScheduleError at the first fault."""
        moving = True
        while moving:
            moving = False
            for rank in self.ranks:
                while rank.at < len(rank.program) and self._step(rank):
                    rank.at += 1
                    moving = True
        self._finish()

    def _step(self, rank: Rank) -> bool:
        """Executes one instruction; False if it has to wait."""
        ins = rank.program[rank.at]
        self._form(rank, ins)
        if ins.stage is None or ins.microbatch is None:
            self._once(rank, ins)
        elif ins.kind is Kind.FORWARD:
            self._forward(rank, ins.stage, ins.microbatch)
        elif ins.kind in COMPUTE:
            self._backward(rank, ins.kind, ins.stage, ins.microbatch)
        elif ins.kind in SEND:
            self._send(rank, ins, ins.microbatch)
        elif ins.kind in RECV:
            return self._recv(rank, ins, ins.microbatch)
        else:
            self._free(rank, ins, ins.microbatch)
        return True

    def _form(self, rank: Rank, ins: Instruction) -> None:
        """Checks that the instruction makes sense by itself and stands on the right rank group."""
        per_stage = ins.kind in COMPUTE | SEND | RECV or ins.kind in (Kind.FREE, Kind.GRAD_SYNC)
        per_mb = per_stage and ins.kind is not Kind.GRAD_SYNC
        moves = ins.kind in SEND | RECV
        for what, given, wanted in (
            ("stage", ins.stage, per_stage),
            ("microbatch", ins.microbatch, per_mb),
            ("value", ins.value, moves or ins.kind is Kind.FREE),
            ("peer stage", ins.peer, moves),
        ):
            if (given is not None) != wanted:
                self._fail(
                    rank, f"{'needs' if wanted else 'takes'} {'a' if wanted else 'no'} {what}"
                )
        if ins.stage is not None and ins.stage not in rank.stages:
            self._fail(rank, f"rank group {rank.index} holds stages {rank.stages}")
        if ins.microbatch is not None and not 0 <= ins.microbatch < self.microbatches:
            self._fail(rank, f"there are {self.microbatches} microbatches")
        if not rank.done and ins.kind is not Kind.GLOBALS:
            self._fail(rank, "comes before GLOBALS, which is first")

    def _once(self, rank: Rank, ins: Instruction) -> None:
        if ins.kind is Kind.GRAD_SYNC:
            assert ins.stage is not None
            if ins.stage in rank.synced:
                self._fail(rank, f"stage {ins.stage} is synchronised twice")
            if self.finished[ins.stage] < self.microbatches:
                self._fail(
                    rank,
                    f"stage {ins.stage} has finished {self.finished[ins.stage]} of "
                    f"{self.microbatches} backwards",
                )
            rank.synced.add(ins.stage)
            return
        if ins.kind not in self.once[len(rank.done) : len(rank.done) + 1]:
            last = ", and NORM, OPTIMIZER last, once each" if self.trains else ", once"
            self._fail(rank, f"each list has GLOBALS first{last}")
        missing = sorted(set(rank.stages) - rank.synced)
        if ins.kind is not Kind.GLOBALS and missing:
            self._fail(rank, f"comes before the GRAD_SYNC of stages {missing}")
        rank.done.append(ins.kind)

    def _forward(self, rank: Rank, stage: int, mb: int) -> None:
        if self.forwards[stage] != mb:
            self._fail(rank, f"stage {stage}'s next forward is microbatch {self.forwards[stage]}")
        self.forwards[stage] += 1
        for way in self.inputs[stage]:
            readers = rank.values.get((way.edge.name, mb))
            if readers is None:
                self._fail(rank, f"needs {way.edge.name!r} of microbatch {mb}, which is not here")
            readers.add(stage)
        for way in self.outputs[stage]:
            rank.values[way.edge.name, mb] = set()
            rank.edge_bytes += way.edge.nbytes
        if self.trains:  # else nothing is kept for a backward
            slot = rank.stages.index(stage)
            rank.counts[slot] += 1
            self.peaks[stage] = max(self.peaks[stage], rank.counts[slot])
        rank.note()

    def _backward(self, rank: Rank, kind: Kind, stage: int, mb: int) -> None:
        if not self.trains:
            self._fail(rank, "these lists only evaluate: there is no backward")
        before = self.backwards.get((stage, mb))
        wanted = Kind.BACKWARD_INPUT if kind is Kind.BACKWARD_WEIGHT else None
        if before is not wanted or mb >= self.forwards[stage]:
            found = "forward to come" if mb >= self.forwards[stage] else before or "forward"
            self._fail(rank, f"the last done of stage {stage}, microbatch {mb} is: {found}")
        self.backwards[stage, mb] = kind
        if kind is not Kind.BACKWARD_WEIGHT:
            self._gradients(rank, stage, mb)
        if kind is not Kind.BACKWARD_INPUT:
            rank.counts[rank.stages.index(stage)] -= 1
            self.finished[stage] += 1
            rank.note()

    def _gradients(self, rank: Rank, stage: int, mb: int) -> None:
        for way in self.outputs[stage]:
            if not way.edge.differentiable:
                continue
            have = rank.grads.get((way.edge.name, mb), frozenset())
            missing = sorted(set(way.edge.targets) - have)
            if missing:
                self._fail(
                    rank,
                    f"the gradient of {way.edge.name!r}, microbatch {mb}, lacks the part of "
                    f"stages {missing}",
                )
        for way in self.inputs[stage]:
            if way.edge.differentiable:
                self._add_gradient(rank, way, mb, frozenset((stage,)))

    def _add_gradient(self, rank: Rank, way: Route, mb: int, part: frozenset[int]) -> None:
        key = (way.edge.name, mb)
        if key in rank.grads:
            rank.note(way.edge.nbytes)  # the part and the sum exist together for a moment
            rank.grads[key] |= part
        else:
            rank.grads[key] = part
            rank.edge_bytes += way.edge.nbytes
            rank.note()

    def _route(self, rank: Rank, ins: Instruction) -> tuple[Route, int]:
        """The route of a transfer and its head stage, if the transfer belongs to it."""
        way = self.ways.get(ins.value or "")
        if way is None:
            self._fail(rank, f"there is no edge {ins.value!r}")
        backward = ins.kind in (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD)
        if backward and not way.edge.differentiable:
            self._fail(rank, f"edge {ins.value!r} has no gradient")
        outward = ins.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        source, head = (ins.stage, ins.peer) if outward else (ins.peer, ins.stage)
        if source != way.edge.source or head not in way.heads.values():
            self._fail(
                rank,
                f"edge {ins.value!r} moves between stage {way.edge.source} and the lowest target "
                f"stage of every other rank group, {sorted(way.heads.values())}",
            )
        assert head is not None
        return way, head

    def _send(self, rank: Rank, ins: Instruction, mb: int) -> None:
        way, head = self._route(rank, ins)
        name = way.edge.name
        if ins.kind is Kind.SEND_FORWARD and (name, mb) not in rank.values:
            self._fail(rank, f"{name!r} of microbatch {mb} is not here")
        if ins.kind is Kind.SEND_BACKWARD:
            missing = sorted(set(way.readers[rank.index]) - rank.grads.get((name, mb), frozenset()))
            if missing:
                self._fail(rank, f"the gradient of {name!r} lacks the part of stages {missing}")
        key = (ins.kind.value[1], name, head, mb)
        if key in self.messages:
            self._fail(rank, "this message was already sent")
        self.messages[key] = False

    def _recv(self, rank: Rank, ins: Instruction, mb: int) -> bool:
        way, head = self._route(rank, ins)
        name = way.edge.name
        key = (ins.kind.value[1], name, head, mb)
        received = self.messages.get(key)
        if received is None:
            return False
        if received:
            self._fail(rank, "this message was already received")
        self.messages[key] = True
        if ins.kind is Kind.RECV_FORWARD:
            rank.values[name, mb] = set()
            rank.edge_bytes += way.edge.nbytes
            rank.note()
        else:
            if self.backwards.get((way.edge.source, mb)) is not None:
                self._fail(rank, f"comes after the backward of stage {way.edge.source} used it")
            part = frozenset(way.readers[self.io.rank_of[head]])
            self._add_gradient(rank, way, mb, part)
        return True

    def _free(self, rank: Rank, ins: Instruction, mb: int) -> None:
        text = ins.value or ""
        gradient = text.startswith(GRAD)
        name = text.removeprefix(GRAD)
        way = self.ways.get(name)
        if way is None or ins.stage not in (way.edge.source, *way.edge.targets):
            self._fail(rank, f"{text!r} is no value of stage {ins.stage}")
        key = (name, mb)
        if key not in (rank.grads if gradient else rank.values):
            self._fail(rank, f"{text!r} of microbatch {mb} is not here")
        if gradient:
            self._check_used_gradient(rank, way, mb)
            del rank.grads[key]
        else:
            late = sorted(set(way.readers.get(rank.index, ())) - rank.values[key])
            if late:
                self._fail(rank, f"stages {late} have still to read {name!r}")
            heads = way.heads.values() if rank.index == way.home else ()
            unsent = [h for h in heads if ("F", name, h, mb) not in self.messages]
            if unsent:
                self._fail(rank, f"{name!r} has still to go to stages {unsent}")
            del rank.values[key]
        rank.edge_bytes -= way.edge.nbytes

    def _check_used_gradient(self, rank: Rank, way: Route, mb: int) -> None:
        name = way.edge.name
        if rank.index == way.home:
            if (way.edge.source, mb) not in self.backwards:
                self._fail(rank, f"stage {way.edge.source} has still to read the gradient")
        elif ("B", name, way.heads[rank.index], mb) not in self.messages:
            self._fail(rank, f"the gradient has still to go to stage {way.edge.source}")

    def _finish(self) -> None:
        stuck = [rank for rank in self.ranks if rank.at < len(rank.program)]
        if stuck:
            waits = "\n".join(f"  {self._waiting(rank)}" for rank in stuck)
            self._fail(stuck[0], f"nobody can go on; who waits for whom:\n{waits}", stuck)
        for rank in self.ranks:
            if tuple(rank.done) != self.once:
                missing = "NORM and OPTIMIZER" if self.trains else "GLOBALS"
                self._fail(rank, f"the list ends without {missing}")
            for stage in rank.stages:
                if self.forwards[stage] < self.microbatches:
                    self._fail(
                        rank,
                        f"stage {stage} has done {self.forwards[stage]} of {self.microbatches} "
                        "forwards",
                    )
            held = [f"{n} of microbatch {m}" for n, m in rank.values]
            held += [f"{GRAD}{n} of microbatch {m}" for n, m in rank.grads]
            if held:
                self._fail(rank, f"never freed: {', '.join(held[:8])}")
        lost = [key for key, received in self.messages.items() if not received]
        if lost:
            way, name, head, mb = lost[0]
            ends = f"stage {self.ways[name].edge.source} and stage {head}"
            raise ScheduleError(
                f"{len(lost)} messages are sent and never received; the first: "
                f"{'activation' if way == 'F' else 'gradient'} {name!r} of microbatch {mb} between "
                f"{ends}"
            )

    def _waiting(self, rank: Rank) -> str:
        ins = rank.program[rank.at]
        assert ins.peer is not None
        peer = self.ranks[self.io.rank_of[ins.peer]]
        where = (
            f"stands at {peer.program[peer.at]}"
            if peer.at < len(peer.program)
            else "has finished without sending it"
        )
        return (
            f"rank group {rank.index} waits at {ins} for rank group {peer.index} "
            f"(stage {ins.peer}), which {where}"
        )

    def _fail(self, rank: Rank, why: str, marked: Sequence[Rank] = ()) -> NoReturn:
        at = min(rank.at, len(rank.program) - 1)
        what = str(rank.program[at]) if rank.at < len(rank.program) else "end of list"
        raise ScheduleError(
            f"rank group {rank.index}, instruction {rank.at} ({what}): {why}\n"
            + grid(self.ranks, marked or (rank,))
        )
