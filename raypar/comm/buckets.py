"""Gradient buckets, all-reduced while the backward pass goes on.

Microbatches are summed in place, and a bucket leaves as soon as its last gradient is there. The
idea is that of Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", sections 3.2.2 and 3.2.3. A gradient that comes as a product of matrices is added to its
sum as it is made, and never exists alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from raypar.comm.group import Group, TensorSpec, Work
from raypar.errors import CommError
from raypar.programs.products import Gradient, Product, as_tensor


@dataclass
class _Bucket:
    """Members of equal dtype that travel together.

    Attributes:
        members: Indices of the gradients, in the order in which they become ready.
        sizes: Elements of each.
        dtype: Dtype of all.
        flat: The memory, allocated once; a step overwrites it without clearing.
        missing: Members whose last microbatch has not come in this step.
        work: The all-reduce under way.
    """

    members: list[int]
    sizes: list[int]
    dtype: torch.dtype
    flat: torch.Tensor | None = None
    missing: int = 0
    work: Work | None = None


def bucket_members(
    specs: Sequence[TensorSpec],
    bucket_bytes: int,
    never: Collection[int] = (),
    *,
    alone: bool = False,
) -> list[list[int]]:
    """Indices of the tensors that travel together, equal dtypes only.

    A bucket is closed when it holds `bucket_bytes`; a tensor is never cut. The bucket whose last
    member is ready first comes first.

    Args:
        specs: The tensors, in the order in which they become ready.
        bucket_bytes: What a bucket holds.
        never: Indices that take no part.
        alone: Whether a tensor that fills a bucket has one for itself.
    """
    open_: dict[torch.dtype, list[int]] = {}
    filled: dict[torch.dtype, int] = {}
    done: list[list[int]] = []
    for index, spec in enumerate(specs):
        if index in never:
            continue
        nbytes = math.prod(spec.shape) * spec.dtype.itemsize
        if alone and nbytes >= bucket_bytes:
            done.append([index])
            continue
        open_.setdefault(spec.dtype, []).append(index)
        filled[spec.dtype] = filled.get(spec.dtype, 0) + nbytes
        if filled[spec.dtype] >= bucket_bytes:
            done.append(open_.pop(spec.dtype))
            filled[spec.dtype] = 0
    done.extend(open_.values())
    return sorted(done, key=lambda members: members[-1])


class GradBuckets:
    """Sums gradients over microbatches, and over a group in the background.

    Buckets are launched in the order of `specs` on every rank, whatever the order of `add`, so that
    all ranks' collectives match. With no group (or one of size 1) there is no flat memory: the
    first gradient is kept as it is, and nothing that a caller owns is ever written.

    Args:
        specs: Shape and dtype of every gradient, in the order in which they become ready.
        group: Who shares the gradients; None for nobody.
        bucket_bytes: A bucket is closed when it holds this much, in bytes. A tensor is never cut.
        average: Divide by the group's size at the end.
        name: Name in errors.
        never: Indices that get no gradient in any step, on all ranks; they take no part.

    Raises:
        CommError: `bucket_bytes` is below 1, or `never` names an unknown index.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        group: Group | None,
        bucket_bytes: int = 4 << 20,
        average: bool = False,
        name: str = "",
        never: Collection[int] = (),
    ) -> None:
        self.name = name or "gradients"
        if bucket_bytes < 1:
            raise CommError(f"{self.name}: bucket_bytes is at least 1, not {bucket_bytes}")
        unknown = [i for i in never if not 0 <= i < len(specs)]
        if unknown:
            raise CommError(f"{self.name}: never names {unknown}, of {len(specs)} gradients")
        self._specs = [TensorSpec(tuple(s.shape), s.dtype) for s in specs]
        self._never = frozenset(never)
        self._group = group if group is not None and group.size > 1 else None
        self._scale = 1.0 / self._group.size if average and self._group is not None else None
        self._buckets: list[_Bucket] = []
        if self._group is not None:
            for members in bucket_members(self._specs, bucket_bytes, self._never):
                sizes = [math.prod(self._specs[i].shape) for i in members]
                self._buckets.append(_Bucket(members, sizes, self._specs[members[0]].dtype))
        self._home = {index: bucket for bucket in self._buckets for index in bucket.members}
        self._device = torch.device("cpu")
        self._views: list[torch.Tensor | None] = [None] * len(specs)
        self._launched = 0
        self._started: list[bool] = []
        self._ended: list[bool] = []
        self._shared: set[int] = set()
        self._owned: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Begins the next step: all gradients are as if they had never come.

        Raises:
            CommError: All-reduces of the last step are still under way; call `finish` first.
        """
        if any(b.work is not None and not b.work.done() for b in self._buckets):
            raise CommError(f"{self.name}: reset before finish: all-reduces are still under way")
        count = len(self._specs)
        self._started = [False] * count
        self._ended = [False] * count
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)
            bucket.work = None
        self._launched = 0
        self._shared.clear()
        self._owned.clear()
        if self._group is None:
            self._views = [None] * count

    def add(self, index: int, grad: Gradient, last: bool) -> None:
        """Adds one microbatch's gradient; `last` says that no other comes for it in this step.

        With a group the gradient is copied or added at once, and may be written or freed when this
        returns. Without one the first is kept by reference: it must not be written before `reset`.

        Raises:
            CommError: Wrong shape or dtype, an index that is in `never`, or a gradient after its
                last.
        """
        self._check(index, grad)
        if self._group is None:
            self._keep(index, grad)
        else:
            self._device = grad.device
            view = self._view(index)
            if self._started[index]:
                _add(view, grad)
            elif isinstance(grad, Product):
                grad.write_to(view)
            else:
                view.copy_(grad)
        self._started[index] = True
        if last:
            self._ended[index] = True
            if self._group is not None:
                self._home[index].missing -= 1
                self._launch_ready()

    def _check(self, index: int, grad: Gradient) -> None:
        if not 0 <= index < len(self._specs):
            raise CommError(f"{self.name}: no gradient {index}; there are {len(self._specs)}")
        spec = self._specs[index]
        if grad.dtype != spec.dtype or tuple(grad.shape) != spec.shape:
            raise CommError(
                f"{self.name}: gradient {index} has shape {tuple(grad.shape)} {grad.dtype}, "
                f"expected {spec.shape} {spec.dtype}"
            )
        if index in self._never:
            raise CommError(f"{self.name}: gradient {index} came, but `never` says it does not")
        if self._ended[index]:
            raise CommError(
                f"{self.name}: gradient {index} came after its last microbatch; call finish and "
                "reset between steps"
            )

    def _keep(self, index: int, grad: Gradient) -> None:
        """Sums without a group.

        A kept tensor belongs to the caller: it may be an activation's gradient too, or another
        parameter's, so it is never written; sums go to memory of ours. What a product makes is
        nobody else's.
        """
        held = self._views[index]
        if held is not None and index in self._owned:
            _add(held, grad)
        elif held is not None:
            self._views[index] = torch.add(held, as_tensor(grad))
            self._owned.add(index)
        elif isinstance(grad, Product):
            self._views[index] = grad.tensor()
            self._owned.add(index)
        else:
            place = grad.untyped_storage().data_ptr()
            whole = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
            if place in self._shared or not whole or not grad.is_contiguous():
                grad = grad.clone(memory_format=torch.contiguous_format)
                self._owned.add(index)
            else:
                self._shared.add(place)
            self._views[index] = grad.detach()

    def _view(self, index: int) -> torch.Tensor:
        view = self._views[index]
        if view is None:
            self._allocate(self._home[index])
            view = self._views[index]
            assert view is not None
        return view

    def _allocate(self, bucket: _Bucket) -> None:
        # The device of the gradients is not known before the first of them.
        bucket.flat = torch.empty(sum(bucket.sizes), dtype=bucket.dtype, device=self._device)
        for index, part in zip(bucket.members, torch.split(bucket.flat, bucket.sizes), strict=True):
            self._views[index] = part.view(self._specs[index].shape)

    def _launch_ready(self) -> None:
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            if bucket.missing:
                return
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        assert self._group is not None
        assert bucket.flat is not None
        bucket.work = self._group.all_reduce(
            bucket.flat, name=f"{self.name} bucket {self._launched} of {len(self._buckets)}"
        )
        self._launched += 1

    def finish(self) -> list[torch.Tensor | None]:
        """Waits for all buckets.

        Returns:
            A gradient per spec, valid until the next step's first `add`; None where `never` says
            so, and, without a group, where none came. With a group a gradient that did not come
            here counts as zeros, since it may have come on other ranks.

        Raises:
            CommError: A gradient came, but not its last microbatch.
            CommTimeoutError: An all-reduce missed its deadline.
        """
        for index, started in enumerate(self._started):
            if started and not self._ended[index]:
                raise CommError(
                    f"{self.name}: the last microbatch of gradient {index} has not come"
                )
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            for index in bucket.members:
                if not self._started[index]:
                    self._view(index).zero_()
            bucket.missing = 0
            self._launch(bucket)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                if self._scale is not None:
                    assert bucket.flat is not None
                    bucket.flat.mul_(self._scale)
                bucket.work = None
        return list(self._views)

    def tensors(self) -> list[torch.Tensor]:
        """All memory held now, for accounts of it."""
        return [t for t in (*self._views, *(b.flat for b in self._buckets)) if t is not None]


def _add(held: torch.Tensor, grad: Gradient) -> None:
    if isinstance(grad, Product):
        grad.add_to(held)
    else:
        held.add_(grad)
