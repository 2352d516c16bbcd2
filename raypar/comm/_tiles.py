"""Where the parts of two cuts of one value overlap, and who sends what overlaps.

A part is a range (or a few) of every dim; see `raypar.sharding.spec.ShardingSpec.ranges`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from raypar.sharding.spec import Ranges

Box = tuple[tuple[int, int], ...]
"""``[start, stop)`` of every dim of a local part."""

Part = tuple[Ranges, ...]
"""What a rank holds: ranges of the whole value for every dim, in local order."""


class Run(NamedTuple):
    """A stretch of one dim that two parts have in common.

    Attributes:
        source: Where it starts in the sender's part.
        target: Where it starts in the receiver's part.
        length: Elements.
    """

    source: int
    target: int
    length: int


Block = tuple[tuple[Run, ...], ...]
"""What two parts have in common: the product of the runs of every dim."""


@lru_cache(maxsize=1 << 14)
def overlap(source: Ranges, target: Ranges) -> tuple[Run, ...]:
    """The runs of one dim that two parts have in common; neighbours are one run."""
    found: list[Run] = []
    sent = 0
    for first, last in source:
        taken = 0
        for start, stop in target:
            low, high = max(first, start), min(last, stop)
            if low < high:
                run = Run(sent + low - first, taken + low - start, high - low)
                before = found[-1] if found else None
                if before and run[:2] == (before[0] + before[2], before[1] + before[2]):
                    found[-1] = Run(before[0], before[1], before[2] + run[2])
                else:
                    found.append(run)
            taken += stop - start
        sent += last - first
    return tuple(found)


def lengths(block: Block) -> tuple[int, ...]:
    """Elements along every dim."""
    return tuple(sum(run.length for run in runs) for runs in block)


def cut_block(block: Block, dim: int, start: int, stop: int) -> Block:
    """Positions ``start`` to ``stop`` of a block along one dim."""
    kept = []
    at = 0
    for run in block[dim]:
        low, high = max(start - at, 0), min(stop - at, run.length)
        if low < high:
            kept.append(Run(run.source + low, run.target + low, high - low))
        at += run.length
    return (*block[:dim], tuple(kept), *block[dim + 1 :])


def boxes(block: Block) -> Iterator[tuple[Box, Box]]:
    """(box in the sender's part, box in the receiver's) of everything in a block."""
    for runs in itertools.product(*block):
        yield (
            tuple((r.source, r.source + r.length) for r in runs),
            tuple((r.target, r.target + r.length) for r in runs),
        )


class Pieces:
    """The different parts that a cut makes, and who holds each.

    Every mesh axis cuts one dim, so that the parts are all combinations of the parts of each dim.

    Args:
        held: Rank → its part.
    """

    def __init__(self, held: dict[int, Part]) -> None:
        self.holders: dict[Part, list[int]] = {}
        for rank, part in held.items():
            self.holders.setdefault(part, []).append(rank)
        n_dims = len(next(iter(self.holders)))
        self._along = [list(dict.fromkeys(p[d] for p in self.holders)) for d in range(n_dims)]

    def blocks(self, wanted: Part) -> Iterator[tuple[Part, Block]]:
        """Every part that overlaps a wanted one, with what they have in common."""
        common = [
            [(theirs, runs) for theirs in along if (runs := overlap(theirs, ranges))]
            for along, ranges in zip(self._along, wanted, strict=True)
        ]
        for choice in itertools.product(*common):
            yield tuple(theirs for theirs, _ in choice), tuple(runs for _, runs in choice)


def share_out(
    blocks: Sequence[Block], holders: Sequence[int], loads: dict[int, int], ways: int
) -> Iterator[tuple[int, int, Block]]:
    """Gives every block to one of its holders, or cuts it between some, so that loads are even.

    The blocks stand in line, and each holder takes the next stretch of it: as much as brings it up
    to the level that all reach together (McNaughton's wrap-around rule, 1959).

    Args:
        blocks: What is to be sent.
        holders: Ranks that can send any of it.
        loads: Elements that ranks send already; those of `holders` are raised.
        ways: Into how many parts a block may be cut, about; with 1 the holder at a block's middle
            sends all of it.

    Yields:
        (index into `blocks`, holder, what it sends of that block).
    """
    weights = [math.prod(lengths(block)) for block in blocks]
    if len(holders) > ways * len(blocks) > len(blocks):
        count = ways * len(blocks)
        holders = [holders[i * len(holders) // count] for i in range(count)]
    ends = list(itertools.accumulate(_room([loads.get(h, 0) for h in holders], sum(weights))))
    last = len(holders) - 1
    at = 0
    for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        if ways > 1:
            places = [(end - at) / weight for end in ends[:-1]]
            parts = _cut_at(block, places)
        else:
            chosen = min(bisect.bisect_left(ends, at + weight / 2), last)
            parts = [None] * len(holders)
            parts[chosen] = block
        for holder, part in zip(holders, parts, strict=True):
            if part is not None:
                loads[holder] = loads.get(holder, 0) + math.prod(lengths(part))
                yield index, holder, part
        at += weight


def _room(loads: Sequence[int], total: int) -> list[float]:
    """How much each may still take until all are level and `total` is gone."""
    level, below = 0.0, 0
    ascending = sorted(loads)
    for count, load in enumerate(ascending, start=1):
        below += load
        level = (total + below) / count
        if count < len(loads) and level <= ascending[count]:
            break
    return [max(0.0, level - load) for load in loads]


def _cut_at(block: Block, places: Sequence[float]) -> list[Block | None]:
    """Cuts a block at some fractions of it; None for an empty part."""
    if not any(0 < place < 1 for place in places):
        parts = 1 + len(places)
        whole = sum(place <= 0 for place in places)
        return [block if i == whole else None for i in range(parts)]
    sizes = lengths(block)
    # The leftmost dim keeps parts contiguous, where it is long enough to be cut evenly.
    enough = 16 * (len(places) + 1)
    dim = next((d for d, n in enumerate(sizes) if n >= enough), None)
    if dim is None:
        dim = max(range(len(sizes)), key=lambda d: sizes[d])
    size = sizes[dim]
    marks = [0, *(min(max(round(place * size), 0), size) for place in places), size]
    return [
        cut_block(block, dim, low, high) if low < high else None
        for low, high in itertools.pairwise(marks)
    ]
