"""Which elements of a tensor a rank has: boxes that are read out of the whole and written back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from raypar.sharding.spec import Ranges, joined

Box = tuple[tuple[int, int], ...]
"""For every dim the first index and the length."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: `[start, stop)` ranges of every dim, put together in order.

    Attributes:
        shape: Shape of the part.
        boxes: Pairs of boxes: where in the whole, and where in the part. One pair unless a dim
            consists of several ranges.
    """

    shape: tuple[int, ...]
    boxes: tuple[tuple[Box, Box], ...]

    @property
    def numel(self) -> int:
        """Elements of the part."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def read(self, whole: torch.Tensor) -> torch.Tensor:
        """The part: a view where it is one box, else new memory."""
        if len(self.boxes) == 1:
            return _narrow(whole, self.boxes[0][0])
        part = whole.new_empty(self.shape)
        for there, here in self.boxes:
            _narrow(part, here).copy_(_narrow(whole, there))
        return part

    def copy_into(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Writes this part of `whole` into `part`."""
        for there, here in self.boxes:
            _narrow(part, here).copy_(_narrow(whole, there))

    def add_into(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Adds this part of `whole` to `part`."""
        for there, here in self.boxes:
            _narrow(part, here).add_(_narrow(whole, there))

    def write(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Writes `part` to its place in `whole`."""
        for there, here in self.boxes:
            _narrow(whole, there).copy_(_narrow(part, here))


@lru_cache(maxsize=1 << 14)
def piece_of(ranges: tuple[Ranges, ...]) -> Piece:
    """The part that `raypar.sharding.spec.ShardingSpec.ranges` names."""
    per_dim = []
    for held in ranges:
        at, places = 0, []
        for start, stop in held:
            places.append(((start, stop - start), (at, stop - start)))
            at += stop - start
        per_dim.append(places)
    boxes = [
        (tuple(there for there, _ in choice), tuple(here for _, here in choice))
        for choice in itertools.product(*per_dim)
    ]
    shape = tuple(sum(stop - start for start, stop in held) for held in ranges)
    return Piece(shape, tuple(boxes))


def whole_piece(shape: Sequence[int]) -> Piece:
    """All of a tensor."""
    return piece_of(tuple(((0, n),) for n in shape))


def within(outer: Ranges, inner: Ranges) -> Ranges | None:
    """Where the elements `inner` of a dim are in the concatenation of `outer`.

    Returns:
        None where `outer` does not have all of them.
    """
    found: list[tuple[int, int]] = []
    for start, stop in inner:
        at = 0
        left = start
        for low, high in outer:
            if low <= left < min(high, stop):
                last = min(high, stop)
                found.append((at + left - low, at + last - low))
                left = last
            at += high - low
        if left < stop:
            return None
    return joined(found)


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, length) in enumerate(box):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, length)
    return tensor


def local_piece(outer: Sequence[Ranges], inner: Sequence[Ranges]) -> Piece | None:
    """The part `inner` of a value, inside the part `outer` of the same value.

    Returns:
        None where `inner` is not inside.
    """
    found = []
    for wide, narrow in zip(outer, inner, strict=True):
        ranges = within(wide, narrow)
        if ranges is None:
            return None
        found.append(ranges)
    return piece_of(tuple(found))
