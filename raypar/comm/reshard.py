"""From one mesh to another: which rank sends which slices of a value to whom. Pure data.

A value lies on a source mesh under one sharding and is wanted on a target mesh under another.
Every receiver gets exactly the elements that it will hold. Two freedoms remain, and cost decides:

* Where the source is replicated, several ranks could send an element. They share the work evenly,
  whole tiles each or with tiles cut between them; a rank on the receiver's node goes first.
* Where the target is replicated over n ranks, each is sent the whole part; or each is sent 1/n of
  it and the n gather the rest among themselves, so that every element crosses between the meshes
  once; or one is sent all of it and broadcasts. (Alpa, Zheng et al. 2022, section 6, gathers
  locally; Zhuang et al. 2023, "On Optimizing the Communication of Model Parallelism", weighs these
  three and balances senders.)

`raypar.comm.resharder` runs such a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from raypar.comm._reshard_plan import (
    BROADCAST,
    DIRECT,
    GATHER,
    Layout,
    ReshardPlan,
    Tile,
    windows,
)
from raypar.comm._tiles import Block, Part, Pieces, boxes, share_out
from raypar.errors import CommError
from raypar.sharding.spec import ShardingSpec, is_shard, window

__all__ = ["ALIKE", "Layout", "LinkCosts", "ReshardPlan", "Tile", "reshard_plan"]

_NEARLY = 1.001  # a simpler way is taken where it costs at most this much more


@dataclass(frozen=True, slots=True)
class LinkCosts:
    """Seconds that messages take (α-β model): between the meshes, and inside one.

    Attributes:
        across_latency_s: α of a message between ranks of the two meshes.
        across_s_per_byte: β of one rank's link to the other mesh.
        inside_latency_s: α of a message inside a mesh, or between ranks of one node.
        inside_s_per_byte: β inside a mesh, or between ranks of one node.
    """

    across_latency_s: float = 50e-6
    across_s_per_byte: float = 1 / 2e9
    inside_latency_s: float = 50e-6
    inside_s_per_byte: float = 1 / 2e9

    def busy_s(self, plan: ReshardPlan) -> float:
        """Seconds of the busiest sender and of the busiest receiver, and of the local collective.

        Both ends count, since either holds up its stage.
        """
        sending: dict[int, float] = {}
        receiving: dict[int, float] = {}
        for (sender, receiver), tiles in plan.messages.items():
            if plan.near(sender, receiver):
                seconds = self.inside_latency_s
                each = self.inside_s_per_byte
            else:
                seconds = self.across_latency_s
                each = self.across_s_per_byte
            seconds += each * plan.itemsize * sum(tile.numel for tile in tiles)
            sending[sender] = sending.get(sender, 0.0) + seconds
            receiving[receiver] = receiving.get(receiver, 0.0) + seconds
        busiest = max(sending.values(), default=0.0) + max(receiving.values(), default=0.0)
        return busiest + self._local_s(plan)

    def _local_s(self, plan: ReshardPlan) -> float:
        if plan.method == DIRECT:
            return 0.0
        n = len(plan.replicas[0])
        nbytes = plan.itemsize * math.prod(
            plan.target.spec.local_shape(plan.shape, plan.target.mesh)
        )
        if plan.method == GATHER:
            rounds, moved = n - 1, nbytes * (n - 1) / n
        else:
            rounds, moved = math.ceil(math.log2(n)), float(nbytes)
        return rounds * self.inside_latency_s + 2 * moved * self.inside_s_per_byte


ALIKE = LinkCosts()
"""All links alike: about what two processes of one machine have."""


@lru_cache(maxsize=1 << 12)
def reshard_plan(
    shape: tuple[int, ...],
    itemsize: int,
    source: Layout,
    target: Layout,
    costs: LinkCosts = ALIKE,
    nodes: tuple[int, ...] | None = None,
) -> ReshardPlan:
    """The cheapest way found to bring a value from one mesh to another.

    Args:
        shape: Shape of the whole value.
        itemsize: Bytes of an element.
        source: Where it lies.
        target: Where it is wanted; its mesh may be apart from, equal to or overlap the source's.
        costs: What messages cost.
        nodes: Node of every rank of the world: senders on the receiver's node are preferred.

    Raises:
        CommError: A sharding does not fit the shape and mesh, or is not made of cuts and ``R``.
    """
    for side, layout in (("source", source), ("target", target)):
        _check(shape, side, layout)
    best: tuple[float, ReshardPlan] | None = None
    for plan in _candidates(shape, itemsize, source, target, nodes):
        cost = costs.busy_s(plan)
        if best is None or cost * _NEARLY < best[0]:
            best = cost, plan
    assert best is not None
    return best[1]


def _check(shape: tuple[int, ...], side: str, layout: Layout) -> None:
    spec, mesh = layout.spec, layout.mesh
    if len(spec) != len(mesh):
        raise CommError(
            f"the {side} sharding {str(spec)!r} has {len(spec)} states, but its mesh {mesh} has "
            f"{len(mesh)} axes: give one state for every axis, for example "
            f"{str(ShardingSpec.replicated(len(mesh)))!r}"
        )
    partial = [state for state in spec if not is_shard(state) and state != "R"]
    if partial:
        raise CommError(
            f"the {side} sharding {str(spec)!r} holds {partial[0]!r}: only values that are cut or "
            f"whole move between meshes; convert it first, for example to "
            f"{str(ShardingSpec(s if is_shard(s) else 'R' for s in spec))!r}"
        )
    if not spec.fits(shape, mesh):
        raise CommError(
            f"the {side} sharding {str(spec)!r} does not divide shape {shape} on a mesh of {mesh}: "
            f"every cut dim must be a multiple of the axes that cut it; "
            f"{str(ShardingSpec.replicated(len(mesh)))!r} always fits"
        )


def _candidates(
    shape: tuple[int, ...],
    itemsize: int,
    source: Layout,
    target: Layout,
    nodes: tuple[int, ...] | None,
) -> Iterator[ReshardPlan]:
    """Plans worth a look, simple ones first."""
    pieces = Pieces(source.parts(shape))
    held = target.parts(shape)
    replicas = target.replicas()
    n = len(replicas[0])
    local = target.spec.local_shape(shape, target.mesh)
    # Cutting a tile between senders needs several that hold the same.
    most = max(len(holders) for holders in pieces.holders.values()) if shape else 1
    cuts = [1, *(2**i for i in range(1, most.bit_length())), *([most] if most & (most - 1) else [])]

    def plans(method: str, wanted: dict[int, Part], dim: int = 0) -> Iterator[ReshardPlan]:
        demand = _Demand(pieces, wanted, nodes)
        for ways in cuts:
            tiles = tuple(demand.tiles(ways))
            plan = ReshardPlan(shape, itemsize, source, target, method, dim, tiles, nodes)
            yield plan
            if plan.imbalance() == 1.0:
                return  # even already: to cut tiles further adds only messages

    yield from plans(DIRECT, held)
    if n == 1 or math.prod(shape) == 0:
        return
    yield from plans(BROADCAST, {group[0]: held[group[0]] for group in replicas})
    if not shape:
        return
    # The dim that divides best, the leftmost of equals.
    dim = min(range(len(shape)), key=lambda d: math.ceil(local[d] / n) / local[d])
    ends = windows(local[dim], n)
    shares = {
        rank: (*held[rank][:dim], window(held[rank][dim], *ends[i]), *held[rank][dim + 1 :])
        for group in replicas
        for i, rank in enumerate(group)
    }
    yield from plans(GATHER, shares, dim)


class _Demand:
    """What the target ranks want of every piece, and who can send it.

    Args:
        pieces: The source's parts.
        wanted: Target rank → what it is to be sent.
        nodes: Node of every rank, where known.
    """

    def __init__(
        self, pieces: Pieces, wanted: dict[int, Part], nodes: tuple[int, ...] | None
    ) -> None:
        self._copies: list[Tile] = []
        # Piece → able senders → (receiver, block).
        self._items: dict[Part, dict[tuple[int, ...], list[tuple[int, Block]]]] = {}
        for rank, part in sorted(wanted.items()):
            for theirs, block in pieces.blocks(part):
                holders = pieces.holders[theirs]
                if rank in holders:
                    self._copies += _as_tiles(rank, rank, block)
                    continue
                near = [] if nodes is None else [h for h in holders if nodes[h] == nodes[rank]]
                by_senders = self._items.setdefault(theirs, {})
                by_senders.setdefault(tuple(near or holders), []).append((rank, block))

    def tiles(self, ways: int) -> list[Tile]:
        """All tiles, by receiver, then by place in what it is sent; see `share_out` for `ways`."""
        found = list(self._copies)
        for by_senders in self._items.values():
            loads: dict[int, int] = {}
            # Those with the fewest senders to choose from first: the others even it out.
            for able, wants in sorted(by_senders.items(), key=lambda item: len(item[0])):
                blocks = [block for _, block in wants]
                for index, sender, block in share_out(blocks, able, loads, ways):
                    found += _as_tiles(sender, wants[index][0], block)
        return sorted(found, key=lambda t: (t.receiver, t.target))


def _as_tiles(sender: int, receiver: int, block: Block) -> Iterable[Tile]:
    return (Tile(sender, receiver, source, target) for source, target in boxes(block))
