"""Bags of embeddings: the table by rows or columns, or the bags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from raypar.graph.passes.emit import aten, bound_args, is_op, op_name
from raypar.sharding.rules._local import cutting, local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.indexing import own_rows
from raypar.sharding.spec import RG, P, R, S, ShardingSpec

_SUM, _MEAN, _MAX = 0, 1, 2


@rule("embedding_bag")
def embedding_bag(op: OpView, size: int) -> Iterator[Choice]:
    """Columns of the table; its rows (a partial sum of what every part has); bags of one width.

    The results behind the first are the kernel's own book-keeping, which no model reads.
    """
    b, extra = op.bound, len(op.tensors) - 3
    books = len(op.results) - 1
    columns = tuple(S(1) if len(r.shape) == 2 else R for r in op.results)
    yield Choice((S(1), R, R, *(RG,) * extra), columns)
    if b["mode"] != _MAX and not b["scale_grad_by_freq"]:
        yield Choice((S(0), R, R, *(RG,) * extra), (P, *(R,) * books))
    if _width(op) is not None and not b["scale_grad_by_freq"]:
        yield Choice((RG, S(0), S(0), *(S(0),) * extra), (S(0),) * (books + 1))


def _width(op: OpView) -> int | None:
    """Indices of every bag where all bags have equally many and their offsets say so."""
    indices, offsets = op.bound["indices"], op.bound["offsets"]
    if op.bound["include_last_offset"] or not isinstance(offsets, fx.Node):
        return None
    if not is_op(offsets) or op_name(offsets) != "arange":
        return None
    ramp = bound_args(offsets)
    step, count = ramp.get("step") or 1, offsets.meta["val"].shape[0]
    total = indices.meta["val"].shape[0]
    return step if not ramp.get("start") and step * count == total else None


@localiser("embedding_bag")
def local_embedding_bag(call: LocalCall) -> fx.Node:
    """Offsets count from the own first bag; rows of other parts weigh nothing."""
    b, strategy, emit = local_bound(call), call.strategy, call.emit
    table, indices_spec = strategy.inputs[0], strategy.inputs[1]
    for axis in cutting(indices_spec, 0):
        name, _ = call.axes[axis]
        rows = _indices_of(call, indices_spec, axis)
        b["offsets"] = emit(torch.ops.raypar.shift_index.default, b["offsets"], rows, name)
    if cutting(table, 0):
        rows = call.op.shapes[0][0]
        index, own = own_rows(call, b["indices"], table, 0, rows, negative=False)
        b["per_sample_weights"] = _weights(call, b, own)
        b.update(indices=index, mode=_SUM)
        if "padding_idx" in b:
            b["padding_idx"] = None  # its rows weigh nothing
    return emit(call.op.node.target, *b.values())


def _indices_of(call: LocalCall, spec: ShardingSpec, axis: int) -> int:
    """Indices of one part after cutting along the axes up to `axis`."""
    rows = call.op.shapes[1][0]
    for cut in cutting(spec, 0):
        if cut <= axis:
            rows //= call.mesh[cut]
    return rows


def _weights(call: LocalCall, b: dict[str, Any], own: fx.Node) -> fx.Node:
    """How much every index counts: 0 for rows of other parts, 1 / its bag's size for a mean."""
    emit = call.emit
    weight, indices, offsets = b["weight"], b["indices"], b["offsets"]
    padding = b.get("padding_idx")
    counted = None
    if isinstance(padding, int):
        counted = emit(aten.ne.Scalar, indices, padding % call.op.shapes[0][0])
        own = emit(aten.logical_and.default, own, counted)
    dtype = weight.meta["val"].dtype
    value = emit(aten.to.dtype, own, dtype)
    given = b["per_sample_weights"]
    if isinstance(given, fx.Node):
        value = emit(aten.mul.Tensor, value, given)
    if b["mode"] != _MEAN:
        return value
    ones = emit(aten.new_ones.default, value, list(indices.meta["val"].shape))
    if counted is not None:
        ones = emit(aten.mul.Tensor, ones, counted)
    places = emit(
        aten.sub.Scalar, emit(aten.cumsum.default, emit(aten.ones_like.default, indices), 0), 1
    )
    bag = emit(aten.sub.Scalar, emit(aten.bucketize.Tensor, places, offsets, right=True), 1)
    sizes = emit(aten.new_zeros.default, value, [offsets.meta["val"].shape[0]])
    sizes = emit(aten.index_add.default, sizes, 0, bag, ones)
    return emit(aten.div.Tensor, value, emit(aten.index_select.default, sizes, 0, bag))
