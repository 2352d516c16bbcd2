"""raypar's collective ops: schemas, fake kernels and gradients.

One op, ``raypar::convert``, moves a value over one mesh axis, and its gradient back. What it does
on a rank is up to the `MeshContext` that the rank has set for its thread; `raypar.comm.mesh`
implements one over groups.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from raypar.errors import CommError
from raypar.sharding.convert import (
    ALL_GATHER,
    ALL_TO_ALL,
    MASK,
    NONE,
    PAD,
    REDUCE_SCATTER,
    SHARD,
)
from raypar.sharding.spec import State, cut_of, shard_dim

_LIBRARY = torch.library.Library("raypar", "FRAGMENT")
_LIBRARY.define(
    "convert(Tensor x, str forward, str backward, str cut, str to, str axis, int size) -> Tensor"
)
_LIBRARY.define("shift_index(Tensor index, int rows, str axis) -> Tensor")


class MeshContext(Protocol):
    """What a rank knows of its own mesh while it runs programs."""

    def coordinate(self, axis: str) -> int:
        """Where this rank is on an axis."""

    def collective(
        self, kind: str, x: torch.Tensor, cut: State, to: State, axis: str
    ) -> torch.Tensor:
        """Runs one collective (`raypar.sharding.convert.COLLECTIVES`); gives a new tensor.

        `part_of` and `join` say how values are cut and put together.
        """


_LOCAL = threading.local()


def set_context(context: MeshContext | None) -> None:
    """Says which mesh the programs of this thread run on."""
    _LOCAL.context = context


def context() -> MeshContext:
    """The mesh of this thread.

    Raises:
        CommError: None is set.
    """
    found: MeshContext | None = getattr(_LOCAL, "context", None)
    if found is None:
        raise CommError("a sharded program ran on a thread that belongs to no mesh")
    return found


def part_of(x: torch.Tensor, cut: State, index: int, size: int) -> torch.Tensor:
    """Part `index` of `size` of a value that is cut; a view where the cut is in one block."""
    dim, groups = cut_of(cut)
    if groups == 1:
        length = x.shape[dim] // size
        return x.narrow(dim, index * length, length)
    blocks = x.unflatten(dim, (groups, -1))
    length = blocks.shape[dim + 1] // size
    return blocks.narrow(dim + 1, index * length, length).flatten(dim, dim + 1)


def join(parts: Sequence[torch.Tensor], cut: State) -> torch.Tensor:
    """The value whose parts, in coordinate order, are `parts`."""
    dim, groups = cut_of(cut)
    if groups == 1:
        return torch.cat(list(parts), dim)
    return torch.cat([p.unflatten(dim, (groups, -1)) for p in parts], dim + 1).flatten(dim, dim + 1)


def local_shape(shape: Sequence[int], kind: str, cut: State, to: State, size: int) -> list[int]:
    """The shape that a conversion of `kind` leaves on one rank."""
    result = list(shape)
    if kind in (SHARD, REDUCE_SCATTER):
        result[shard_dim(cut)] //= size
    elif kind in (ALL_GATHER, PAD):
        result[shard_dim(cut)] *= size
    elif kind == ALL_TO_ALL:
        result[shard_dim(cut)] *= size
        result[shard_dim(to)] //= size
    return result


def _convert(
    x: torch.Tensor, forward: str, backward: str, cut: str, to: str, axis: str, size: int
) -> torch.Tensor:
    if forward == NONE:
        return x.clone()
    mesh = context()
    if forward == SHARD:
        return part_of(x, cut, mesh.coordinate(axis), size).clone(
            memory_format=torch.contiguous_format
        )
    if forward == PAD:
        x = x.contiguous()
        zero = torch.zeros_like(x)
        at = mesh.coordinate(axis)
        return join([x if i == at else zero for i in range(size)], cut)
    if forward == MASK:
        return x.clone() if mesh.coordinate(axis) == 0 else torch.zeros_like(x)
    return mesh.collective(forward, x, cut, to, axis)


def _convert_fake(
    x: torch.Tensor, forward: str, backward: str, cut: str, to: str, axis: str, size: int
) -> torch.Tensor:
    if forward == NONE:  # left out of programs: what follows sees the strides of `x` itself
        return x.new_empty_strided(x.size(), x.stride())
    if forward == MASK:
        return torch.empty_like(x)
    return x.new_empty(local_shape(x.shape, forward, cut, to, size))


def _convert_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.arguments = inputs[1:]


def _convert_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    forward, backward, cut, to, axis, size = ctx.arguments
    if backward == NONE:
        return (grad, *(None,) * 6)
    if forward == ALL_TO_ALL:
        cut, to = to, cut
    back = torch.ops.raypar.convert(grad, backward, forward, cut, to, axis, size)
    return (back, *(None,) * 6)


def _shift_index(index: torch.Tensor, rows: int, axis: str) -> torch.Tensor:
    return index - context().coordinate(axis) * rows


def _shift_fake(index: torch.Tensor, rows: int, axis: str) -> torch.Tensor:
    return torch.empty_like(index)


_LIBRARY.impl("convert", _convert, "CompositeExplicitAutograd")
_LIBRARY.impl("shift_index", _shift_index, "CompositeExplicitAutograd")
torch.library.register_fake("raypar::convert", _convert_fake, lib=_LIBRARY)
torch.library.register_fake("raypar::shift_index", _shift_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "raypar::convert", _convert_backward, setup_context=_convert_context, lib=_LIBRARY
)
