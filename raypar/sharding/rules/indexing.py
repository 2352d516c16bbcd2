"""Reading and writing along one dim by index: ``gather``, ``scatter``, ``index_add`` and kin.

Dims that no index touches are cut like any other. Where the indexed dim itself is cut, every part
reads (or adds) what it has and zero else: reads add up to a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.spec import RG, P, R, S, ShardingSpec


def floating(node: fx.Node) -> bool:
    """Whether a value may be a partial sum."""
    return bool(node.meta["val"].is_floating_point())


def _static(shape: Sequence[object]) -> list[bool]:
    """Which dims have a size that does not depend on the data."""
    return [isinstance(n, int) for n in shape]


def own_rows(
    call: LocalCall, index: fx.Node, spec: ShardingSpec, dim: int, rows: int, negative: bool
) -> tuple[fx.Node, fx.Node]:
    """Indices into the own part of a cut dim, and which of them point into it.

    Args:
        call: The call that is being written.
        index: Indices into the whole dim.
        spec: How the indexed value lies.
        dim: The indexed dim, cut in one block.
        rows: Size of the whole dim.
        negative: Whether indices may count from the end.

    Returns:
        Indices that are valid for the part, and a mask of those that are its own.
    """
    emit = call.emit
    if negative:
        wrapped = emit(aten.add.Scalar, index, rows)
        index = emit(aten.where.self, emit(aten.lt.Scalar, index, 0), wrapped, index)
    for axis in cutting(spec, dim):
        name, size = call.axes[axis]
        rows //= size
        index = emit(torch.ops.raypar.shift_index.default, index, rows, name)
    own = emit(
        aten.logical_and.default,
        emit(aten.ge.Scalar, index, 0),
        emit(aten.lt.Scalar, index, rows),
    )
    return emit(aten.clamp.default, index, 0, rows - 1), own


def masked(call: LocalCall, value: fx.Node, own: fx.Node) -> fx.Node:
    """The value, and zero where a row is not the own one."""
    zero = call.emit(aten.new_zeros.default, value, [])
    return call.emit(aten.where.self, own, value, zero)


def _along(call: LocalCall, own: fx.Node, ndim: int, dim: int) -> fx.Node:
    """A mask over one dim, to meet a value of `ndim` dims."""
    return call.emit(aten.reshape.default, own, [-1 if d == dim else 1 for d in range(ndim)])


# -- one index vector ------------------------------------------------------------------------------


@rule("index_select")
def index_select(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; the selection; the dim that is selected from."""
    if len(op.shapes[1]) != 1 or not op.out:
        return
    dim = op.bound["dim"] % len(op.out)
    for d in range(len(op.out)):
        if d != dim:
            yield Choice((S(d), R), (S(d),))
    if all(_static(op.shapes[1])):
        yield Choice((RG, S(0)), (S(dim),))
    if floating(op.tensors[0]):
        yield Choice((P, R), (P,))
        yield Choice((S(dim), R), (P,))


@localiser("index_select")
def local_index_select(call: LocalCall) -> fx.Node:
    """Rows of other parts are zero."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    ndim = len(call.op.out)
    dim = b["dim"] % ndim
    if not cutting(spec, dim):
        return call.same()
    rows = call.op.shapes[0][dim]
    index, own = own_rows(call, b["index"], spec, dim, rows, negative=False)
    picked = call.emit(aten.index_select.default, b["self"], dim, index)
    return masked(call, picked, _along(call, own, ndim, dim))


@rule("index_add")
def index_add(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; the rows that are added (a partial sum); the rows that are added to."""
    if len(op.shapes[1]) != 1:
        return
    dim = op.bound["dim"] % len(op.out)
    for d in range(len(op.out)):
        if d != dim:
            yield Choice((S(d), R, S(d)), (S(d),))
    if not op.results[0].is_floating_point():
        return
    yield Choice((P, R, P), (P,))
    if all(_static(op.shapes[1])):
        yield Choice((P, S(0), S(dim)), (P,))
    yield Choice((S(dim), R, RG), (S(dim),))


@localiser("index_add")
def local_index_add(call: LocalCall) -> fx.Node:
    """Rows that belong to other parts are added as zero."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    ndim = len(call.op.out)
    dim = b["dim"] % ndim
    if not cutting(spec, dim):
        return call.same()
    rows = call.op.out[dim]
    index, own = own_rows(call, b["index"], spec, dim, rows, negative=False)
    source = masked(call, b["source"], _along(call, own, ndim, dim))
    alpha = b["alpha"] if b["alpha"] is not None else 1
    return call.emit(aten.index_add.default, b["self"], dim, index, source, alpha=alpha)


@rule("index_copy", "index_fill")
def index_copy(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims."""
    if not op.out or len(op.shapes[1]) != 1:
        return
    dim = op.bound["dim"] % len(op.out)
    for d in range(len(op.out)):
        if d != dim:
            # The third tensor is what is copied, or the one number that is filled in.
            rest = (S(d) if len(shape) == len(op.out) else RG for shape in op.shapes[2:])
            yield Choice((S(d), R, *rest), (S(d),))


# -- an index for every element --------------------------------------------------------------------


@rule("gather", "take_along_dim")
def gather(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims that both have whole; the indices; the dim that is gathered from."""
    value, index = op.shapes[:2]
    if op.bound["dim"] is None or len(value) != len(index) or not index:
        return
    dim = op.bound["dim"] % len(value)
    for d in range(len(value)):
        if d != dim and value[d] == index[d]:
            yield Choice((S(d), S(d)), (S(d),))
    yield Choice((RG, S(dim)), (S(dim),))
    if floating(op.tensors[0]):
        yield Choice((P, R), (P,))
        yield Choice((S(dim), R), (P,))


@localiser("gather", "take_along_dim")
def local_gather(call: LocalCall) -> fx.Node:
    """What other parts have is zero."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    dim = b["dim"] % len(call.op.out)
    if not cutting(spec, dim):
        return call.same()
    name = "index" if "index" in b else "indices"
    rows = call.op.shapes[0][dim]
    index, own = own_rows(call, b[name], spec, dim, rows, negative=name == "indices")
    if name == "index":
        picked = call.emit(aten.gather.default, b["self"], dim, index)
    else:
        picked = call.emit(aten.take_along_dim.default, b["self"], index, dim)
    return masked(call, picked, own)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims that all have whole; added values are a partial sum over their parts."""
    if not op.out or len(op.shapes[1]) != len(op.out):
        return
    dim = op.bound["dim"] % len(op.out)
    others = len(op.tensors) - 1
    for d in range(len(op.out)):
        if d != dim and len({shape[d] for shape in op.shapes}) == 1:
            yield Choice((S(d),) * (others + 1), (S(d),))
    if op.name == "scatter_add" and floating(op.tensors[0]):
        yield Choice((P, R, P), (P,))
        if op.shapes[1][dim] == op.shapes[2][dim]:
            yield Choice((P, S(dim), S(dim)), (P,))


@rule("slice_scatter")
def slice_scatter(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; both are linear."""
    dim = op.bound["dim"] % len(op.out)
    for d in range(len(op.out)):
        if d != dim:
            yield Choice((S(d), S(d)), (S(d),))
    if op.results[0].is_floating_point():
        yield Choice((P, P), (P,))


@rule("select_scatter")
def select_scatter(op: OpView, size: int) -> Iterator[Choice]:
    """Other dims; both are linear."""
    dim = op.bound["dim"] % len(op.out)
    for d in range(len(op.out)):
        if d != dim:
            yield Choice((S(d), S(d - (d > dim))), (S(d),))
    if op.results[0].is_floating_point():
        yield Choice((P, P), (P,))
