"""A rank's transfers: receives posted ahead, sends that nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raypar.comm.group import Group, Work
from raypar.comm.reshard import ALIKE, Layout, LinkCosts, ReshardPlan, reshard_plan
from raypar.comm.resharder import ReplicaGroups, Resharder
from raypar.schedules.instructions import RECV, SEND, Instruction
from raypar.stages.spec import DATA, Axes, RankSpec

_LOOKAHEAD = 2  # receives posted ahead of the one that is waited for
_TIDY = 64  # finished sends are dropped when so many are held


class Transfers:
    """Moves activations and gradients between this rank and the others.

    Replica r of one stage talks to replica r of the other. A value that lies differently on their
    meshes is cut and put together on its way (`raypar.comm.reshard`).

    Args:
        spec: What the rank is.
        world: All ranks; every one of them makes its transfers at the same point.
        costs: What messages cost, equal on all ranks: decides how values move. Default: what the
            spec says.
    """

    def __init__(self, spec: RankSpec, world: Group, costs: LinkCosts | None = None) -> None:
        self._spec = spec
        self._plan = spec.posts
        self._posted: dict[Instruction, list[Work]] = {}
        self._sends: list[Work] = []
        self._routes = _routes(spec, world, costs)

    def post(self, position: int) -> None:
        """Posts the receives that are due before the instruction at `position`."""
        for now in self._plan.get(position, ()):
            self._posted[now] = self._route(now).post(_tag(now))

    def receive(self, now: Instruction) -> torch.Tensor:
        """Waits for what a receive instruction names, and gathers it from replicas if need be.

        Returns:
            This rank's part, contiguous.
        """
        value = self._route(now).finish(self._posted.pop(now))
        assert value is not None
        return value

    def send(self, now: Instruction, value: torch.Tensor) -> None:
        """Starts a send; `value`, this rank's part, must not be written before `finish`."""
        self._sends += self._route(now).send(value, _tag(now))
        if len(self._sends) > _TIDY:
            self._sends = [send for send in self._sends if not send.done()]

    def finish(self) -> None:
        """Waits for all sends of the step."""
        for send in self._sends:
            send.wait()
        self._sends.clear()

    def _route(self, now: Instruction) -> Resharder:
        assert now.value is not None and now.stage is not None and now.peer is not None
        own, other = (self._spec.rank_group_of[s] for s in (now.stage, now.peer))
        ends = (other, own) if now.kind in RECV else (own, other)
        return self._routes[now.value, *ends]


def edge_plan(
    spec: RankSpec, edge: str, sender: int, receiver: int, costs: LinkCosts | None = None
) -> ReshardPlan:
    """How a value, or its gradient, goes from one rank group to another, on replica 0.

    On replica r the ranks of either side are r inner meshes higher (`inner_size`).

    Args:
        spec: Any rank's spec of the run.
        edge: The value's id.
        sender: Rank group that sends.
        receiver: Rank group that receives.
        costs: What messages cost; default: what the spec says.

    Raises:
        CommError: A sharding of `RankSpec.edge_specs` does not fit the value.
    """
    shape, dtype = spec.shapes[edge]
    ends = [
        Layout(
            spec.edge_specs[edge, group],
            tuple(size for name, size in spec.meshes[group] if name != DATA),
            spec.bases[group],
        )
        for group in (sender, receiver)
    ]
    costs = costs or spec.link_costs.get((sender, receiver), ALIKE)
    return reshard_plan(shape, getattr(torch, dtype).itemsize, *ends, costs)


def inner_size(axes: Axes) -> int:
    """Ranks of one replica: they follow one another, since ``data`` is the first axis."""
    return math.prod(size for name, size in axes if name != DATA)


def _routes(
    spec: RankSpec, world: Group, costs: LinkCosts | None
) -> dict[tuple[str, int, int], Resharder]:
    """(value, sending rank group, receiving rank group) → this rank's share of it.

    Every rank of the world makes the subgroups of all of them, in the same order.
    """
    groups = ReplicaGroups(world)
    device = torch.device("cuda" if spec.accelerator and torch.cuda.is_available() else "cpu")
    found: dict[tuple[str, int, int], Resharder] = {}
    for edge in spec.edges:
        source = spec.rank_group_of[edge.source]
        targets = dict.fromkeys(spec.rank_group_of[t] for t in edge.targets)
        ways = [(source, g) for g in targets if g != source]
        if edge.differentiable:
            ways += [(b, a) for a, b in ways]
        for sender, receiver in ways:
            plan = edge_plan(spec, edge.name, sender, receiver, costs)
            steps = [inner_size(spec.meshes[group]) for group in (sender, receiver)]
            for replica in range(spec.replicas):
                mine = replica == spec.replica and spec.group in (sender, receiver)
                if not mine and not plan.replicas:
                    continue  # no subgroup to make: every rank need not look at every replica
                moved = plan.moved(*(replica * step for step in steps))
                groups.make(moved)
                if mine:
                    dtype = getattr(torch, spec.shapes[edge.name][1])
                    key = (edge.name, sender, receiver)
                    found[key] = Resharder(moved, world, dtype, device, groups)
    return found


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
