"""Runs resharding plans: values between meshes, and sums over meshes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raypar.comm._reshard_plan import BROADCAST, GATHER, Layout, ReshardPlan, Tile
from raypar.comm._tiles import Box
from raypar.comm.group import Group, TensorSpec, Work
from raypar.comm.reshard import ALIKE, LinkCosts, reshard_plan
from raypar.errors import CommError

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class ReplicaGroups:
    """Subgroups of the world in which replicas of a part gather it; each is made once.

    Args:
        world: All ranks.
    """

    def __init__(self, world: Group) -> None:
        self._world = world
        self._made: dict[tuple[int, ...], Group | None] = {}

    def make(self, plan: ReshardPlan) -> None:
        """Makes the groups of a plan. Every rank of the world calls it, in the same order."""
        for ranks in plan.replicas:
            if ranks not in self._made:
                self._made[ranks] = self._world.subgroup(ranks, f"replicas at ranks {list(ranks)}")

    def of(self, plan: ReshardPlan, rank: int) -> Group | None:
        """The group in which a target rank of `plan` takes part; None where there is none."""
        ranks = plan.group_of(rank)
        return None if ranks is None else self._made[ranks]


class Resharder:
    """One rank's share of one plan; it can run any number of times.

    Args:
        plan: What is sent. Every rank has the same.
        world: All ranks.
        dtype: Of the value.
        device: Where received values live.
        groups: Local groups; None to make those of the plan here, which every rank of the world
            then does in the same order.

    Raises:
        CommError: `dtype` has another size than the plan was made for.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        world: Group,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        groups: ReplicaGroups | None = None,
    ) -> None:
        if dtype.itemsize != plan.itemsize:
            raise CommError(
                f"{dtype} has {dtype.itemsize} bytes an element, but the plan was made for "
                f"{plan.itemsize}: make it with itemsize={dtype.itemsize}"
            )
        if groups is None:
            groups = ReplicaGroups(world)
            groups.make(plan)
        rank = world.rank
        self.plan = plan
        self._world = world
        self._dtype = dtype
        self._device = torch.device(device)
        self._receives = rank in plan.target.ranks
        self._group = groups.of(plan, rank) if self._receives else None
        self._part = plan.sent(rank) if self._receives else None
        self._window = plan.windows() if plan.method == GATHER else []
        self._outgoing = [(to, t) for (by, to), t in plan.messages.items() if by == rank]
        self._incoming = [
            (by, t, TensorSpec(_message_shape(t), dtype))
            for (by, to), t in plan.messages.items()
            if to == rank
        ]
        self._copies = [t for t in plan.tiles if t.sender == t.receiver == rank]

    def post(self, tag: str) -> list[Work]:
        """Begins to receive; `finish` takes what this returns."""
        return [self._world.irecv(form, sender, tag) for sender, _, form in self._incoming]

    def send(self, local: torch.Tensor, tag: str) -> list[Work]:
        """Begins to send this rank's part; it must not be written before all of these are done."""
        return [
            self._world.isend(_packed(local, tiles), receiver, tag)
            for receiver, tiles in self._outgoing
        ]

    def finish(
        self, posted: Sequence[Work], local: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Waits for what was posted, and runs the local collective.

        The replicas of a part call it for the same plans in the same order.

        Args:
            posted: From `post`.
            local: This rank's own part, where it is on the source mesh too.

        Returns:
            What this rank holds on the target mesh, contiguous; it may be a message's, or where
            nothing had to move `local`'s own memory. None on a rank that is not on that mesh.
        """
        if not self._receives:
            return None
        part = self._assembled(posted, local)
        if self._group is None:
            return part
        whole = self.plan.whole_part
        if self.plan.method == BROADCAST:
            if part is None:
                part = torch.empty(whole, dtype=self._dtype, device=self._device)
            self._group.broadcast(part, root=0, name="replicas of a received value")
            return part
        assert part is not None
        return self._gathered(part, self._group)

    def run(self, local: torch.Tensor | None, tag: str) -> torch.Tensor | None:
        """Moves a value and waits for it.

        Args:
            local: This rank's part on the source mesh; None on other ranks.
            tag: Names the messages, equal on all ranks.

        Returns:
            See `finish`.

        Raises:
            CommError: This rank is on the source mesh, and `local` is not what it holds there.
        """
        self.check(local)
        posted = self.post(tag)
        sends = [] if local is None else self.send(local, tag)
        result = self.finish(posted, local)
        for send in sends:
            send.wait()
        return result

    def check(self, local: torch.Tensor | None) -> None:
        """Refuses what is not this rank's part on the source mesh.

        Raises:
            CommError: The text says which shape and dtype it must have.
        """
        plan, rank = self.plan, self._world.rank
        if rank not in plan.source.ranks:
            return
        wanted = plan.source.spec.local_shape(plan.shape, plan.source.mesh)
        found = None if local is None else (tuple(local.shape), local.dtype)
        if found != (wanted, self._dtype):
            raise CommError(
                f"rank {rank} holds shape {wanted} {self._dtype} of a value of shape {plan.shape} "
                f"as {str(plan.source.spec)!r} on a mesh of {plan.source.mesh}, but was given "
                f"{'nothing' if found is None else f'shape {found[0]} {found[1]}'}"
            )

    def _assembled(self, posted: Sequence[Work], local: torch.Tensor | None) -> torch.Tensor | None:
        """The part that was sent here, from its messages and the own tiles."""
        shape = self._part
        if shape is None:
            return None
        if len(posted) == 1 and not self._copies and len(self._incoming[0][1]) == 1:
            message = _received(posted[0])
            if tuple(message.shape) == shape:
                return message  # the common case: one tile that is the whole part
        if not posted and len(self._copies) == 1 and self._copies[0].shape == shape:
            assert local is not None
            return _at(local, self._copies[0].source).contiguous()
        part = torch.empty(shape, dtype=self._dtype, device=self._device)
        for tile in self._copies:
            assert local is not None
            _at(part, tile.target).copy_(_at(local, tile.source))
        for (_, tiles, _), work in zip(self._incoming, posted, strict=True):
            _unpack(part, tiles, _received(work))
        return part

    def _gathered(self, part: torch.Tensor, group: Group) -> torch.Tensor:
        dim = self.plan.dim
        longest = self._window[0][1]
        if part.shape[dim] < longest:  # all_gather takes equal shapes
            padded = part.new_zeros((*part.shape[:dim], longest, *part.shape[dim + 1 :]))
            padded.narrow(dim, 0, part.shape[dim]).copy_(part)
            part = padded
        parts = group.all_gather(part, name="replicas of a received value")
        return torch.cat(
            [p.narrow(dim, 0, stop - start) for p, (start, stop) in zip(parts, self._window)], dim
        )


class ReshardSum:
    """Adds up a value of which several meshes hold a summand each, and gives all of them the sum.

    Every mesh sends its summand to every other in one round, and all add up in the order of the
    layouts, so that the sums are bitwise equal everywhere: tied parameters stay tied.

    Args:
        shape: Shape of the whole value.
        dtype: Its dtype; float16 and bfloat16 are added up in float32 and rounded once.
        layouts: One for every mesh that holds a summand, equal on all ranks; the meshes are apart.
        world: All ranks; every one of them makes this, in the same order.
        device: Where the summands live.
        groups: Local groups, to share them with others; None for own ones.
        costs: What messages cost.

    Raises:
        CommError: A layout does not fit the shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        layouts: Sequence[Layout],
        world: Group,
        device: torch.device | str = "cpu",
        groups: ReplicaGroups | None = None,
        costs: LinkCosts = ALIKE,
    ) -> None:
        groups = ReplicaGroups(world) if groups is None else groups
        self._own = next((i for i, at in enumerate(layouts) if world.rank in at.ranks), None)
        self._out: list[Resharder] = []
        self._in: dict[int, Resharder] = {}
        self._count = len(layouts)
        for i, source in enumerate(layouts):
            for j, target in enumerate(layouts):
                if i == j:
                    continue
                plan = reshard_plan(tuple(shape), dtype.itemsize, source, target, costs)
                groups.make(plan)
                if i == self._own:
                    self._out.append(Resharder(plan, world, dtype, device, groups))
                elif j == self._own:
                    self._in[i] = Resharder(plan, world, dtype, device, groups)

    def run(self, local: torch.Tensor, tag: str) -> torch.Tensor:
        """The sum as this rank holds it; a new tensor unless there is one mesh alone.

        Args:
            local: This rank's part of its mesh's summand.
            tag: Names the messages, equal on all ranks.

        Raises:
            CommError: This rank is on none of the meshes, or `local` is not its part.
        """
        if self._own is None:
            raise CommError(f"{tag}: this rank holds no summand: call run() on the meshes' ranks")
        posted = {i: one.post(tag) for i, one in self._in.items()}
        sends: list[Work] = []
        for one in self._out:
            one.check(local)
            sends += one.send(local, tag)
        parts: list[torch.Tensor] = []
        for i in range(self._count):
            part = local if i == self._own else self._in[i].finish(posted[i])
            assert part is not None
            parts.append(part)
        for send in sends:
            send.wait()
        return _sum(parts)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype in _LOW_PRECISION else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def _at(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, stop) in enumerate(box):
        if stop - start != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _message_shape(tiles: Sequence[Tile]) -> tuple[int, ...]:
    """A tile alone keeps its shape; several travel flat, one after the other."""
    return tiles[0].shape if len(tiles) == 1 else (sum(tile.numel for tile in tiles),)


def _packed(local: torch.Tensor, tiles: Sequence[Tile]) -> torch.Tensor:
    if len(tiles) == 1:
        return _at(local, tiles[0].source).contiguous()
    return torch.cat([_at(local, tile.source).reshape(-1) for tile in tiles])


def _unpack(part: torch.Tensor, tiles: Sequence[Tile], message: torch.Tensor) -> None:
    flat = message.reshape(-1)
    at = 0
    for tile in tiles:
        _at(part, tile.target).copy_(flat.narrow(0, at, tile.numel).view(tile.shape))
        at += tile.numel


def _received(work: Work) -> torch.Tensor:
    value = work.wait()
    assert value is not None
    return value
