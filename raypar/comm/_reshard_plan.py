"""Resharding as data: where values lie, what is sent, how much that is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

from raypar.comm._tiles import Block, Box, Part, Pieces
from raypar.sharding.spec import ShardingSpec, is_shard

DIRECT, GATHER, BROADCAST = "direct", "all_gather", "broadcast"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a value lies.

    Attributes:
        spec: A state for every mesh axis: cut or ``R``.
        mesh: Size of every mesh axis.
        first: Rank of the mesh's first position; the others follow row-major.
    """

    spec: ShardingSpec
    mesh: tuple[int, ...]
    first: int = 0

    @property
    def ranks(self) -> range:
        """The ranks of the mesh."""
        return range(self.first, self.first + math.prod(self.mesh))

    def parts(self, shape: tuple[int, ...]) -> dict[int, Part]:
        """Rank → the ranges of every dim that it holds."""
        places = itertools.product(*map(range, self.mesh))
        return {
            rank: self.spec.ranges(shape, self.mesh, place)
            for rank, place in zip(self.ranks, places, strict=True)
        }

    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold the same, for every different part; both ascending."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, place in zip(self.ranks, itertools.product(*map(range, self.mesh)), strict=True):
            key = tuple(c for c, s in zip(place, self.spec, strict=True) if is_shard(s))
            found.setdefault(key, []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of elements that one rank sends to another.

    Attributes:
        sender: Rank.
        receiver: Rank; where it is the sender itself, the tile is copied.
        source: ``[start, stop)`` of every dim of the sender's local part.
        target: ``[start, stop)`` of every dim of what the receiver is sent (`ReshardPlan.sent`).
    """

    sender: int
    receiver: int
    source: Box
    target: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along every dim."""
        return tuple(stop - start for start, stop in self.source)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ReshardPlan:
    """How one value gets from a source mesh to a target mesh.

    Attributes:
        shape: The whole value's.
        itemsize: Bytes of an element.
        source: Where it lies.
        target: Where it is wanted.
        method: ``direct``: every receiver is sent its whole part. ``all_gather``: it is sent a
            window of it along `dim` and gathers the rest from its replicas. ``broadcast``: the
            first replica is sent the whole and broadcasts it.
        dim: The dim along which parts are gathered; 0 for other methods.
        tiles: What is sent, in order of receivers.
        nodes: Node of every rank of the world, where known.
    """

    shape: tuple[int, ...]
    itemsize: int
    source: Layout
    target: Layout
    method: str
    dim: int
    tiles: tuple[Tile, ...]
    nodes: tuple[int, ...] | None = None

    @property
    def whole_part(self) -> tuple[int, ...]:
        """Shape of what every target rank holds in the end."""
        return self.target.spec.local_shape(self.shape, self.target.mesh)

    @cached_property
    def messages(self) -> dict[tuple[int, int], tuple[Tile, ...]]:
        """(sender, receiver) → the tiles of the one message between them; copies are not in it."""
        found: dict[tuple[int, int], list[Tile]] = {}
        for tile in self.tiles:
            if tile.sender != tile.receiver:
                found.setdefault((tile.sender, tile.receiver), []).append(tile)
        return {pair: tuple(tiles) for pair, tiles in found.items()}

    @cached_property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """The groups of target ranks that take part in one local collective each."""
        return self.target.replicas() if self.method != DIRECT else ()

    def group_of(self, rank: int) -> tuple[int, ...] | None:
        """The local collective's group that `rank` is in; None without one."""
        return next((group for group in self.replicas if rank in group), None)

    def windows(self) -> list[tuple[int, int]]:
        """For an all-gather: the window along `dim` that each replica is sent; may be empty."""
        return windows(self.whole_part[self.dim], len(self.replicas[0]))

    def sent(self, rank: int) -> tuple[int, ...] | None:
        """Shape of what a target rank is sent, before the local collective; None for nothing."""
        whole = self.whole_part
        group = self.group_of(rank)
        if group is None:
            return whole
        if self.method == BROADCAST:
            return whole if rank == group[0] else None
        start, stop = self.windows()[group.index(rank)]
        return (*whole[: self.dim], stop - start, *whole[self.dim + 1 :])

    def moved(self, source_by: int, target_by: int) -> ReshardPlan:
        """The same between meshes whose ranks are so many higher."""
        if not source_by and not target_by:
            return self
        return replace(
            self,
            source=replace(self.source, first=self.source.first + source_by),
            target=replace(self.target, first=self.target.first + target_by),
            tiles=tuple(
                Tile(t.sender + source_by, t.receiver + target_by, t.source, t.target)
                for t in self.tiles
            ),
        )

    def near(self, a: int, b: int) -> bool:
        """Whether two ranks are known to share a node."""
        return self.nodes is not None and self.nodes[a] == self.nodes[b]

    def volume(self) -> int:
        """Bytes sent between ranks, local collectives not counted."""
        return self.itemsize * sum(t.numel for tiles in self.messages.values() for t in tiles)

    def local_volume(self) -> int:
        """Bytes sent by the local collectives."""
        if self.method == DIRECT:
            return 0
        return self.itemsize * math.prod(self.shape) * (len(self.replicas[0]) - 1)

    def lower_bound(self) -> int:
        """Bytes that must be sent at least: every element that some target rank lacks, once."""
        wanting: dict[Part, list[int]] = {}
        for rank, part in self.target.parts(self.shape).items():
            wanting.setdefault(part, []).append(rank)
        pieces = Pieces(self.source.parts(self.shape))
        return self.itemsize * sum(
            _numel(block)
            for wanted, ranks in wanting.items()
            for theirs, block in pieces.blocks(wanted)
            if not set(ranks) <= set(pieces.holders[theirs])
        )

    def busiest(self) -> int:
        """Bytes that the busiest sender sends."""
        return max(self._sent_by().values(), default=0)

    def imbalance(self) -> float:
        """`busiest` over what each source rank would send if all sent equally much; 1 is even."""
        volume = self.volume()
        return self.busiest() * len(self.source.ranks) / volume if volume else 1.0

    def _sent_by(self) -> dict[int, int]:
        loads: dict[int, int] = {}
        for (sender, _), tiles in self.messages.items():
            nbytes = self.itemsize * sum(tile.numel for tile in tiles)
            loads[sender] = loads.get(sender, 0) + nbytes
        return loads


def windows(length: int, n: int) -> list[tuple[int, int]]:
    """Cuts a dim for n replicas: equal windows, the last ones shorter where n does not divide."""
    step = math.ceil(length / n)
    return [(min(i * step, length), min((i + 1) * step, length)) for i in range(n)]


def _numel(block: Block) -> int:
    return math.prod(sum(run.length for run in runs) for runs in block)
