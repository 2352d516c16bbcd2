"""Gradient buckets, reduce-scattered while the backward pass goes on: every rank keeps its part.

A bucket is one flat tensor with a row for every rank, and a row holds that rank's piece of every
member, one after the other. So one reduce-scatter serves many parameters, whichever dims they are
cut in, and so does one all-gather (`raypar.comm.gather`). What is cut when is that of Rajbhandari
et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.

A large gradient has a bucket for itself. Where it is cut in dim 0, that bucket is the gradient as
it was; where it is a product of matrices and cut in columns, its transpose. So products can be
added to it while they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raypar.comm._rows import Rows, Split, check_splits
from raypar.comm.buckets import bucket_members
from raypar.comm.group import Group, Work
from raypar.errors import CommError
from raypar.programs.products import Gradient, Product, as_tensor

__all__ = ["ScatterBuckets", "Split"]


class _Bucket:
    """One bucket of gradients.

    Attributes:
        rows: Where its members lie.
        flat: (ranks, row) memory that is being filled, or that of the finished sum.
        sent: The same of the round that is under way, where every microbatch is a round.
        own: This rank's reduced row, added up over rounds.
        filled: Members that have come in this round.
        ended: Rounds that have left in this step.
        work: The reduce-scatter under way.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.flat: torch.Tensor | None = None
        self.sent: torch.Tensor | None = None
        self.own: torch.Tensor | None = None
        self.filled: set[int] = set()
        self.missing: int = len(rows.members)
        self.ended = 0
        self.work: Work | None = None


class ScatterBuckets:
    """Sums gradients over microbatches and over a group; every rank keeps its own pieces.

    Buckets leave in the same order on all ranks, whatever the order of `add`, as soon as all their
    members are there, and travel in the background.

    Args:
        splits: Every gradient, in the order in which they become ready.
        group: Who shares the gradients.
        bucket_bytes: A bucket is closed when it holds this much of uncut gradients, in bytes.
        every_microbatch: Reduce each microbatch's gradients as soon as they are there, and add up
            the reduced pieces: no more than two buckets of uncut gradients ever exist. Every
            gradient then comes once in every microbatch. Else the uncut sums are held until the
            last microbatch, and reduced once.
        name: Name in errors.

    Raises:
        CommError: A split does not name as many pieces as the group has ranks, or unequal ones.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        group: Group,
        bucket_bytes: int = 4 << 20,
        every_microbatch: bool = False,
        name: str = "",
    ) -> None:
        self.name = name or "gradients"
        check_splits(splits, group, self.name)
        self._splits = tuple(splits)
        self._group = group
        self._eager = every_microbatch
        specs = [s.spec for s in splits]
        members = bucket_members(specs, bucket_bytes, alone=not every_microbatch)
        self._buckets = [_Bucket(Rows(m, splits, turned=self._is_turned(m))) for m in members]
        self._home = {i: bucket for bucket in self._buckets for i in bucket.rows.members}
        self._device = torch.device("cpu")
        self._spare: dict[torch.dtype, list[torch.Tensor]] = {}
        self._under_way: _Bucket | None = None
        self._next = 0
        self._started: set[int] = set()
        self._ended: set[int] = set()

    # ---- a step ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Begins the next step: all gradients are as if they had never come.

        Raises:
            CommError: Reduce-scatters of the last step are still under way; call `finish` first.
        """
        if any(b.work is not None and not b.work.done() for b in self._buckets):
            raise CommError(f"{self.name}: reset before finish: reductions are still under way")
        for bucket in self._buckets:
            bucket.filled.clear()
            bucket.missing = len(bucket.rows.members)
            bucket.ended = 0
            bucket.work = None
        self._under_way = None
        self._next = 0
        self._started.clear()
        self._ended.clear()

    def add(self, index: int, grad: Gradient, last: bool) -> None:
        """Adds one microbatch's uncut gradient; it may be written or freed when this returns.

        Args:
            index: Which one.
            grad: Of the split's shape and dtype.
            last: No other comes for it in this step.

        Raises:
            CommError: Wrong shape or dtype, a gradient after its last, or a second one before its
                bucket has left.
        """
        self._check(index, grad)
        self._device = grad.device
        bucket = self._home[index]
        if bucket.flat is None:
            bucket.flat = self._memory(bucket)
        adding = index in bucket.filled
        if adding and self._eager:
            raise CommError(
                f"{self.name}: gradient {index} came twice before the other gradients of its bucket"
            )
        if isinstance(grad, Product) and self._lies_whole(bucket, index, grad):
            product = grad.transposed if bucket.rows.turned else grad
            whole = bucket.flat.view(product.shape)
            if adding:
                product.add_to(whole)
            else:
                product.write_to(whole)
        else:
            self._fill(bucket, index, as_tensor(grad), adding)
        bucket.filled.add(index)
        self._started.add(index)
        if last:
            self._ended.add(index)
        if self._eager or last:
            bucket.missing -= 1
            self._launch_ready()

    def finish(self) -> list[torch.Tensor]:
        """Waits for all buckets.

        Returns:
            This rank's piece of every gradient, valid until the next step's first `add`. One that
            did not come here counts as zeros, since it may have come on other ranks.

        Raises:
            CommError: A gradient came, but not its last microbatch.
            CommTimeoutError: A reduction missed its deadline.
        """
        open_ = sorted(self._started - self._ended)
        if open_:
            raise CommError(f"{self.name}: the last microbatch of gradient {open_[0]} has not come")
        if not self._eager:
            self._launch_rest()
        self._settle()
        found: dict[int, torch.Tensor] = {}
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            row = self._own_row(bucket)
            for index in bucket.rows.members:
                piece = self._splits[index].pieces[self._group.rank]
                found[index] = bucket.rows.of(row, index, piece).contiguous()
        return [found[index] for index in range(len(self._splits))]

    def tensors(self) -> list[torch.Tensor]:
        """All memory held now, for accounts of it."""
        held = [t for b in self._buckets for t in (b.flat, b.sent, b.own) if t is not None]
        return held + [t for spare in self._spare.values() for t in spare]

    # ---- buckets --------------------------------------------------------------------------

    def _lies_whole(self, bucket: _Bucket, index: int, product: Product) -> bool:
        """Whether a bucket's rows, one after the other, are this gradient and nothing else.

        Where they are turned: whether they are its transpose.
        """
        if self._eager or bucket.rows.members != [index]:
            return False
        return product.is_matrix if bucket.rows.turned else self._splits[index].in_rows

    def _is_turned(self, members: list[int]) -> bool:
        """Whether a bucket holds the transpose of its one gradient; equal on all ranks."""
        split = self._splits[members[0]]
        return not self._eager and len(members) == 1 and split.product and split.in_columns

    def _fill(self, bucket: _Bucket, index: int, grad: torch.Tensor, adding: bool) -> None:
        assert bucket.flat is not None
        for row, piece in zip(bucket.flat, self._splits[index].pieces, strict=True):
            part = bucket.rows.of(row, index, piece)
            if adding:
                piece.add_into(grad, part)
            else:
                piece.copy_into(grad, part)

    def _check(self, index: int, grad: Gradient) -> None:
        if not 0 <= index < len(self._splits):
            raise CommError(f"{self.name}: no gradient {index}; there are {len(self._splits)}")
        spec = self._splits[index].spec
        if grad.dtype != spec.dtype or tuple(grad.shape) != tuple(spec.shape):
            raise CommError(
                f"{self.name}: gradient {index} has shape {tuple(grad.shape)} {grad.dtype}, "
                f"expected {tuple(spec.shape)} {spec.dtype}"
            )
        if index in self._ended:
            raise CommError(
                f"{self.name}: gradient {index} came after its last microbatch; call finish and "
                "reset between steps"
            )

    def _memory(self, bucket: _Bucket) -> torch.Tensor:
        """Unwritten memory for a bucket: of its own, or, in rounds, what another one left."""
        n, dtype, length = self._group.size, bucket.rows.dtype, bucket.rows.length
        if not self._eager:
            return torch.empty((n, length), dtype=dtype, device=self._device)
        spare = self._spare.setdefault(dtype, [])
        if spare:
            memory = spare.pop()
        else:
            longest = max(b.rows.length for b in self._buckets if b.rows.dtype == dtype)
            memory = torch.empty(n * longest, dtype=dtype, device=self._device)
        return memory.as_strided((n, length), (length, 1))

    def _launch_ready(self) -> None:
        while self._buckets:
            if not self._eager and self._next == len(self._buckets):
                return
            bucket = self._buckets[self._next % len(self._buckets)]
            if bucket.missing:
                return
            self._launch(bucket)

    def _launch_rest(self) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.flat is None:
                bucket.flat = self._memory(bucket)
            for index in bucket.rows.members:
                if index not in bucket.filled:
                    for row, piece in zip(bucket.flat, self._splits[index].pieces, strict=True):
                        bucket.rows.of(row, index, piece).zero_()
            bucket.missing = 0
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        if self._eager:
            self._settle()
        assert bucket.flat is not None
        at = self._next % len(self._buckets)
        flat = bucket.flat
        if self._eager:
            bucket.sent, bucket.flat = flat, None
        bucket.work = self._group.ireduce_scatter(
            list(flat),
            into=flat[self._group.rank],
            name=f"{self.name} bucket {at} of {len(self._buckets)}",
        )
        bucket.ended += 1
        bucket.filled.clear()
        bucket.missing = len(bucket.rows.members)
        self._next += 1
        if self._eager:
            self._under_way = bucket

    def _settle(self) -> None:
        """Adds up the microbatch's bucket that is under way, and frees its memory."""
        bucket, self._under_way = self._under_way, None
        if bucket is None:
            return
        assert bucket.work is not None
        assert bucket.sent is not None
        bucket.work.wait()
        bucket.work = None
        reduced = bucket.sent[self._group.rank]
        if bucket.own is None:
            bucket.own = torch.empty_like(reduced)
        if bucket.ended == 1:
            bucket.own.copy_(reduced)
        else:
            bucket.own.add_(reduced)
        room = bucket.sent.untyped_storage().nbytes() // bucket.sent.itemsize
        self._spare[bucket.rows.dtype].append(bucket.sent.as_strided((room,), (1,)))
        bucket.sent = None

    def _own_row(self, bucket: _Bucket) -> torch.Tensor:
        if not self._eager:
            assert bucket.flat is not None
            return bucket.flat[self._group.rank]
        if bucket.own is None:
            bucket.own = torch.empty(
                bucket.rows.length, dtype=bucket.rows.dtype, device=self._device
            )
        if not bucket.ended:
            bucket.own.zero_()
        return bucket.own
