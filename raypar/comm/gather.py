"""Copies of parameters, brought up to date from the pieces that the ranks' optimizers change.

The bucketed all-gather after the step of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models", section 5.1; `raypar.comm.scatter` is its other half.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raypar.comm._rows import Rows, Split, check_splits
from raypar.comm.buckets import bucket_members
from raypar.comm.group import Group, TensorSpec, Work
from raypar.errors import CommError
from raypar.sharding.pieces import Piece


@dataclass(frozen=True)
class Copy:
    """A tensor that all ranks hold and of which each keeps one piece up to date.

    Attributes:
        whole: This rank's copy.
        own: This rank's piece, whether a view of `whole` or not.
        pieces: Which part each rank of the group has, of equal sizes.
    """

    whole: torch.Tensor
    own: torch.Tensor
    pieces: tuple[Piece, ...]


class GatherBuckets:
    """Brings every rank's copies up to date from all ranks' own pieces, in the background.

    Args:
        copies: The tensors, in the same order on all ranks.
        group: Who has the pieces.
        bucket_bytes: A bucket is closed when it holds this much of whole tensors, in bytes.
        name: Name in errors.

    Raises:
        CommError: A copy does not name as many pieces as the group has ranks, or unequal ones.
    """

    def __init__(
        self, copies: Sequence[Copy], group: Group, bucket_bytes: int = 4 << 20, name: str = ""
    ) -> None:
        self.name = name or "parameters"
        splits = [Split(TensorSpec(tuple(c.whole.shape), c.whole.dtype), c.pieces) for c in copies]
        check_splits(splits, group, self.name)
        self._copies = tuple(copies)
        self._group = group
        members = bucket_members([s.spec for s in splits], bucket_bytes)
        self._buckets = [Rows(m, splits) for m in members]
        self._under_way: deque[tuple[Rows, Work]] = deque()

    def start(self) -> None:
        """Sends all own pieces, as they are now, on their way.

        Until `finish`, what arrives is held beside the copies: up to their size once more.

        Raises:
            CommError: What was started before is not finished.
        """
        if self._under_way:
            raise CommError(f"{self.name}: a gather was started before the last one was finished")
        for at, rows in enumerate(self._buckets):
            row = torch.cat([self._copies[i].own.detach().reshape(-1) for i in rows.members])
            name = f"{self.name} bucket {at} of {len(self._buckets)}"
            self._under_way.append((rows, self._group.iall_gather(row, name=name)))

    def finish(self) -> bool:
        """Copies everything to its place as it arrives.

        Returns:
            Whether anything was under way.

        Raises:
            CommTimeoutError: A gather missed its deadline.
        """
        any_ = bool(self._under_way)
        while self._under_way:
            self._place(*self._under_way.popleft())
        return any_

    def _place(self, rows: Rows, work: Work) -> None:
        gathered = work.wait()
        assert gathered is not None
        for index in rows.members:
            copy = self._copies[index]
            inside = (
                copy.own.untyped_storage().data_ptr() == copy.whole.untyped_storage().data_ptr()
            )
            for rank, piece in enumerate(copy.pieces):
                if rank != self._group.rank or not inside:
                    piece.write(copy.whole, rows.of(gathered[rank], index, piece))
