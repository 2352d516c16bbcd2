"""A rank's transfers: receives posted ahead, sends that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raypar.comm.group import Group, TensorSpec, Work
from raypar.schedules.instructions import RECV, SEND, Instruction
from raypar.stages.spec import RankSpec

_LOOKAHEAD = 2  # receives posted ahead of the one that is waited for
_TIDY = 64  # finished sends are dropped when so many are held


class Transfers:
    """Moves activations and gradients between this rank and the others.

    Replica r of one stage talks to replica r of the other.
    """

    def __init__(self, spec: RankSpec, world: Group) -> None:
        self._spec = spec
        self._world = world
        self._plan = spec.posts
        self._posted: dict[Instruction, Work] = {}
        self._sends: list[Work] = []

    def post(self, position: int) -> None:
        """Posts the receives that are due before the instruction at `position`."""
        for now in self._plan.get(position, ()):
            assert now.peer is not None and now.value is not None
            shape, dtype = self._spec.shapes[now.value]
            spec = TensorSpec(shape, getattr(torch, dtype))
            self._posted[now] = self._world.irecv(spec, self._peer(now.peer), _tag(now))

    def receive(self, now: Instruction) -> torch.Tensor:
        """Waits for what a receive instruction names."""
        value = self._posted.pop(now).wait()
        assert value is not None
        return value

    def send(self, now: Instruction, value: torch.Tensor) -> None:
        """Starts a send; `value` must not be written before `finish`."""
        assert now.peer is not None
        self._sends.append(self._world.isend(value, self._peer(now.peer), _tag(now)))
        if len(self._sends) > _TIDY:
            self._sends = [send for send in self._sends if not send.done()]

    def finish(self) -> None:
        """Waits for all sends of the step."""
        for send in self._sends:
            send.wait()
        self._sends.clear()

    def _peer(self, stage: int) -> int:
        spec = self._spec
        return spec.rank_group_of[stage] * spec.replicas + spec.replica


def _tag(now: Instruction) -> str:
    """What identifies a message within a step, equal on both sides."""
    assert now.message is not None
    return ":".join(map(str, now.message))


def posting_plan(
    lists: Sequence[Sequence[Instruction]], group: int
) -> dict[int, tuple[Instruction, ...]]:
    """Position → receives that a rank group posts before the instruction there.

    Each is posted two receives ahead, and those from one peer in the order in which that peer
    sends them: NCCL matches the messages of a pair of ranks by order alone.
    """
    own = lists[group]
    receives = [i for i, now in enumerate(own) if now.kind in RECV]
    due: dict[Instruction, int] = {}
    for order, position in enumerate(receives):
        due[own[position]] = receives[order - _LOOKAHEAD] if order >= _LOOKAHEAD else 0
    by_message = {now.message: now for now in due}
    sent_at: dict[Instruction, int] = {}
    for peer, theirs in enumerate(lists):
        if peer == group:
            continue
        mine = [by_message[s.message] for s in theirs if s.kind in SEND and s.message in by_message]
        for earlier, later in zip(reversed(mine[:-1]), reversed(mine[1:]), strict=True):
            due[earlier] = min(due[earlier], due[later])
        sent_at.update({now: i for i, now in enumerate(mine)})
    plan: dict[int, tuple[Instruction, ...]] = {}
    for now in sorted(due, key=lambda n: (due[n], sent_at[n])):
        plan[due[now]] = (*plan.get(due[now], ()), now)
    return plan
