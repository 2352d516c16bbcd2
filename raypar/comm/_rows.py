"""Flat buckets with a row for every rank: where each rank's piece of every member lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.errors import CommError
from raypar.sharding.pieces import Piece


@dataclass(frozen=True)
class Split:
    """How one tensor is cut over a group.

    Attributes:
        spec: The uncut tensor.
        pieces: Which part of it each rank of the group has, of equal sizes.
        product: It comes as a product of matrices, which can be added to a sum as it is made.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    product: bool = False

    @cached_property
    def in_rows(self) -> bool:
        """Whether the pieces, one after the other, are the tensor's elements in their order."""
        return bool(self.spec.shape) and self._along(0)

    @cached_property
    def in_columns(self) -> bool:
        """Whether the pieces are the columns of a matrix, one after the other."""
        return len(self.spec.shape) == 2 and self._along(1)

    def _along(self, dim: int) -> bool:
        """Whether the pieces, one after the other along a dim, make up the tensor."""
        shape, at = tuple(self.spec.shape), 0
        for piece in self.pieces:
            length = piece.shape[dim]
            if piece.shape != (*shape[:dim], length, *shape[dim + 1 :]):
                return False
            if len(piece.boxes) != 1 or piece.boxes[0][0][dim][0] != at:
                return False
            at += length
        return at == shape[dim]


class Rows:
    """Where the members of one bucket lie in a row; equal on all ranks.

    Args:
        members: Numbers of the tensors.
        splits: All tensors.
        turned: The pieces, which are matrices, lie column by column.
    """

    def __init__(
        self, members: list[int], splits: Sequence[Split], *, turned: bool = False
    ) -> None:
        self.members = members
        self.turned = turned
        self.dtype = splits[members[0]].spec.dtype
        self.places: dict[int, tuple[int, int]] = {}
        self.length = 0
        for index in members:
            count = splits[index].pieces[0].numel
            self.places[index] = (self.length, count)
            self.length += count

    def of(self, row: torch.Tensor, index: int, piece: Piece) -> torch.Tensor:
        """The member's piece, as a view of a row."""
        start, count = self.places[index]
        flat = row.narrow(0, start, count)
        return flat.view(piece.shape[::-1]).mT if self.turned else flat.view(piece.shape)


def check_splits(splits: Sequence[Split], group: Group, name: str) -> None:
    """Refuses splits that are not one equal piece for every rank.

    Raises:
        CommError: Names the first.
    """
    for index, split in enumerate(splits):
        if len(split.pieces) != group.size:
            raise CommError(
                f"{name}: tensor {index} is cut in {len(split.pieces)} pieces, but the group has "
                f"{group.size} ranks"
            )
        sizes = {piece.numel for piece in split.pieces}
        if len(sizes) > 1:
            raise CommError(f"{name}: tensor {index} has pieces of unequal sizes {sorted(sizes)}")
