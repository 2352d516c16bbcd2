"""Ops that take tensors apart and put them together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from raypar.sharding.rules._local import parts_of
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.labels import cut_choices, dims, is_float, linear_choices
from raypar.sharding.spec import P, S

_MOST_BLOCKS = 16
"""A slice is taken for one of so many equal blocks at most."""


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; the dim itself where the pieces are equal: a part of each piece."""
    dim, count = op.bound["dim"] % len(op.out), len(op.results)
    labels = dims(op.shapes[0], without=[dim])
    yield from cut_choices(op, [labels], [labels] * count)
    if len({r.shape[dim] for r in op.results}) == 1:
        for g in op.blocks(dim):
            yield Choice((S(dim, count * g),), (S(dim, g),) * count)
    if is_float(op.tensors[0]):
        yield from linear_choices(op, [0])


@localiser("split", "split_with_sizes", "tensor_split", "unsafe_split")
def local_split(call: LocalCall) -> fx.Node:
    """Pieces of the local size."""
    dim = call.op.bound["dim"] % len(call.op.out)
    parts = parts_of(call.strategy.inputs[0], dim, call.mesh)
    for name in ("split_size", "split_sizes", "indices"):
        given = call.op.bound.get(name)
        if parts > 1 and given is not None:
            less = (
                [n // parts for n in given] if isinstance(given, list | tuple) else given // parts
            )
            return call.again(**{name: less})
    return call.same()


@rule("unbind")
def unbind(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; partial sums."""
    yield from _without(op, op.bound["dim"] % len(op.shapes[0]))


@rule("select")
def select(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; partial sums."""
    yield from _without(op, op.bound["dim"] % len(op.shapes[0]))


def _without(op: OpView, dim: int) -> Iterator[Choice]:
    labels = dims(op.shapes[0], without=[dim])
    yield from cut_choices(op, [labels], [labels[:dim] + labels[dim + 1 :]] * len(op.results))
    if is_float(op.tensors[0]):
        yield from linear_choices(op, [0])


@rule("slice", "narrow")
def slices(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; the dim itself where some of its equal blocks are taken; partial sums."""
    dim = op.bound["dim"] % len(op.out)
    labels = dims(op.shapes[0], without=[] if op.out == op.shapes[0] else [dim])
    yield from cut_choices(op, [labels], [labels])
    start, length, step = _range(op, dim)
    if op.out != op.shapes[0] and step == 1 and length:
        whole = op.shapes[0][dim]
        block = math.gcd(start, length, whole)
        if whole // block <= _MOST_BLOCKS:
            yield Choice((S(dim, whole // block),), (S(dim, length // block),))
    if is_float(op.tensors[0]):
        yield from linear_choices(op, [0])


def _range(op: OpView, dim: int) -> tuple[int, int, int]:
    """(first element, elements, step) of a slice; a start that is no number counts as odd."""
    start = op.bound["start"] or 0
    step = op.bound.get("step", 1)
    if not isinstance(start, int) or not isinstance(op.out[dim], int):
        return 0, 0, 0
    if start < 0:
        start += op.shapes[0][dim]
    return start, op.out[dim], step


@localiser("slice", "narrow")
def local_slice(call: LocalCall) -> fx.Node:
    """The same blocks of the local value."""
    dim = call.op.bound["dim"] % len(call.op.out)
    parts = parts_of(call.strategy.inputs[0], dim, call.mesh)
    if parts == 1:
        return call.same()
    if call.op.out == call.op.shapes[0]:
        start, length = 0, call.local_out()[dim]
    else:
        start, length, _ = _range(call.op, dim)
        start, length = start // parts, length // parts
    if call.op.name == "narrow":
        return call.again(start=start, length=length)
    return call.emit(call.op.node.target, call.args[0], dim, start, start + length)


@rule("cat", "concat", "concatenate")
def cat(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; the dim itself where the pieces are equal: then it is cut in blocks."""
    dim = op.bound["dim"] % len(op.out)
    if any(len(shape) != len(op.out) for shape in op.shapes):
        return  # an empty one-dimensional tensor, which cat ignores
    labels = dims(op.out, without=[dim])
    count = len(op.tensors)
    yield from cut_choices(op, [labels] * count, [labels])
    if len({shape[dim] for shape in op.shapes}) == 1:
        for g in sorted({1, *(b for i in range(count) for b in op.input_blocks(i, dim))}):
            yield Choice((S(dim, g),) * count, (S(dim, count * g),))
    if all(is_float(t) for t in op.tensors):
        yield from linear_choices(op, range(count))


@rule("stack", "hstack", "vstack")
def stack(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but the new one; partial sums."""
    if op.name == "stack":
        dim = op.bound["dim"] % len(op.out)
        out = dims(op.out, without=[dim])
        yield from cut_choices(op, [out[:dim] + out[dim + 1 :]] * len(op.tensors), [out])
    if all(is_float(t) for t in op.tensors):
        yield Choice((P,) * len(op.tensors), (P,))
