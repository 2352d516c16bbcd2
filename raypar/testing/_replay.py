"""Instruction lists executed with symbols instead of tensors.

A second, independent reading of the conventions in `raypar.schedules.compile`: where
`raypar.schedules.check` follows rules, this computes. Every value is a number that depends on all
that went into it, every sum is a set, so that two runs agree only if they did the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.errors import ScheduleError
from raypar.schedules.instructions import Instruction, Kind
from raypar.schedules.io import Edge, StageIO


@dataclass(frozen=True)
class Outcome:
    """What a step did to one stage.

    Attributes:
        gradients: The parts of its parameters' gradient, one per microbatch.
        buffers: The microbatches in the order in which forward saw them.
    """

    gradients: tuple[int, ...]
    buffers: tuple[int, ...]


def _forward(io: StageIO, stage: int, mb: int, inputs: dict[str, int]) -> dict[str, int]:
    seen = tuple(sorted(inputs.items()))
    return {e.name: hash((e.name, mb, seen)) for e in io.edges if e.source == stage}


def _backward(
    io: StageIO, stage: int, mb: int, inputs: dict[str, int], arrived: dict[str, frozenset[int]]
) -> tuple[dict[str, int], int]:
    """Gradients of the inputs, and the part of the parameters' gradient."""
    core = hash((stage, mb, tuple(sorted(inputs.items())), tuple(sorted(arrived.items()))))
    backs = [e for e in io.edges if stage in e.targets and e.differentiable]
    return {e.name: hash((core, e.name, "input")) for e in backs}, hash((core, "weight"))


def _inputs(io: StageIO, stage: int) -> list[Edge]:
    return [e for e in io.edges if stage in e.targets]


def _outputs(io: StageIO, stage: int) -> list[Edge]:
    return [e for e in io.edges if e.source == stage and e.differentiable]


def reference(io: StageIO, microbatches: int) -> tuple[Outcome, ...]:
    """What one process computes, microbatch after microbatch."""
    parts: list[list[int]] = [[] for _ in range(io.n_stages)]
    for mb in range(microbatches):
        values: dict[str, int] = {}
        grads: dict[str, frozenset[int]] = {}
        for stage in range(io.n_stages):
            inputs = {e.name: values[e.name] for e in _inputs(io, stage)}
            values |= _forward(io, stage, mb, inputs)
        for stage in reversed(range(io.n_stages)):
            inputs = {e.name: values[e.name] for e in _inputs(io, stage)}
            arrived = {e.name: grads[e.name] for e in _outputs(io, stage)}
            sent, part = _backward(io, stage, mb, inputs, arrived)
            parts[stage].append(part)
            for name, gradient in sent.items():
                grads[name] = grads.get(name, frozenset()) | {gradient}
    order = tuple(range(microbatches))
    return tuple(Outcome(tuple(sorted(part)), order) for part in parts)


class _Rank:
    def __init__(
        self, io: StageIO, held: list[int], mail: dict[tuple[object, ...], object]
    ) -> None:
        self.io = io
        self.mail = mail
        self.values: dict[tuple[str, int], int] = {}
        self.grads: dict[tuple[str, int], frozenset[int]] = {}
        self.saved: dict[tuple[int, int], dict[str, int]] = {}
        self.halves: dict[tuple[int, int], int] = {}
        self.parts: dict[int, list[int]] = {s: [] for s in held}
        self.buffers: dict[int, list[int]] = {s: [] for s in held}
        self.synced: dict[int, int] = {}
        self.updated = False

    def step(self, ins: Instruction) -> bool:
        """Executes `ins`; False if its message is not there yet. KeyError: something is missing."""
        kind, stage, mb, name = ins.kind, ins.stage, ins.microbatch, ins.value
        if kind is Kind.NORM:
            if self.synced != {s: len(part) for s, part in self.parts.items()}:
                raise KeyError("gradients that are not final")
        elif kind is Kind.OPTIMIZER:
            self.updated = True
        elif stage is None:
            pass
        elif stage not in self.parts or self.updated:
            raise KeyError("stage")
        elif kind is Kind.GRAD_SYNC:
            self.synced[stage] = len(self.parts[stage])
        elif mb is not None and name is None:
            self._compute(kind, stage, mb)
        elif mb is not None and name is not None:
            return self._move(ins, mb, name)
        return True

    def _compute(self, kind: Kind, stage: int, mb: int) -> None:
        key = (stage, mb)
        if kind is Kind.FORWARD:
            if key in self.saved or key in self.halves:
                raise KeyError("done before")
            inputs = {e.name: self.values[e.name, mb] for e in _inputs(self.io, stage)}
            self.saved[key] = inputs
            self.buffers[stage].append(mb)
            for name, value in _forward(self.io, stage, mb, inputs).items():
                self.values[name, mb] = value
            return
        if kind is Kind.BACKWARD_WEIGHT:
            self.parts[stage].append(self.halves.pop(key))
            return
        arrived = {e.name: self.grads[e.name, mb] for e in _outputs(self.io, stage)}
        sent, part = _backward(self.io, stage, mb, self.saved.pop(key), arrived)
        for name, gradient in sent.items():
            self.grads[name, mb] = self.grads.get((name, mb), frozenset()) | {gradient}
        if kind is Kind.BACKWARD:
            self.parts[stage].append(part)
        else:
            self.halves[key] = part

    def _move(self, ins: Instruction, mb: int, name: str) -> bool:
        key = (name, mb)
        if ins.kind is Kind.FREE:
            if name.startswith("grad:"):
                del self.grads[name.removeprefix("grad:"), mb]
            else:
                del self.values[key]
        elif ins.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            label = (ins.kind.value[1], name, mb, ins.stage, ins.peer)
            if label in self.mail:
                raise KeyError("sent before")
            forward = ins.kind is Kind.SEND_FORWARD
            self.mail[label] = self.values[key] if forward else self.grads[key]
        else:
            label = (ins.kind.value[1], name, mb, ins.peer, ins.stage)
            if label not in self.mail:
                return False
            found = self.mail.pop(label)
            if isinstance(found, frozenset):
                self.grads[key] = self.grads.get(key, frozenset()) | found
            elif isinstance(found, int) and key not in self.values:
                self.values[key] = found
            else:
                raise KeyError("received before")
        return True


def replay(
    lists: Sequence[Sequence[Instruction]], io: StageIO, microbatches: int
) -> tuple[Outcome, ...]:
    """Executes the lists.

    Raises:
        ScheduleError: They deadlock, use what is not there, or leave something behind.
    """
    mail: dict[tuple[object, ...], object] = {}
    held = [[s for s in range(io.n_stages) if io.rank_of[s] == r] for r in range(len(lists))]
    ranks = [_Rank(io, stages, mail) for stages in held]
    at = [0] * len(lists)
    moving = True
    while moving:
        moving = False
        for r, rank in enumerate(ranks):
            while at[r] < len(lists[r]):
                ins = lists[r][at[r]]
                try:
                    if not rank.step(ins):
                        break
                except KeyError as error:
                    raise ScheduleError(f"replay of {ins} on rank group {r}: no {error}") from None
                at[r] += 1
                moving = True
    for r, rank in enumerate(ranks):
        left = rank.values or rank.grads or rank.saved or rank.halves
        if at[r] < len(lists[r]) or left or mail or not rank.updated:
            raise ScheduleError(f"replay: rank group {r} stands at {at[r]}, holds {left}, {mail}")
    outcomes = []
    for stage in range(io.n_stages):
        rank = ranks[io.rank_of[stage]]
        outcomes.append(Outcome(tuple(sorted(rank.parts[stage])), tuple(rank.buffers[stage])))
    return tuple(outcomes)
