"""Embedding tables."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.indexing import own_rows
from raypar.sharding.rules.labels import cut_choices
from raypar.sharding.spec import P, R, S

_COLUMNS = "columns"


@rule("embedding")
def embedding(op: OpView, size: int) -> Iterator[Choice]:
    """Dims of the indices; columns of the table; its rows (vocabulary-parallel, a partial sum)."""
    lead: list[object] = list(range(len(op.shapes[1])))
    counts = bool(op.bound["scale_grad_by_freq"])  # over all indices there are
    labels = [_COLUMNS] if counts else [*lead, _COLUMNS]
    yield from cut_choices(op, [[None, _COLUMNS], lead], [[*lead, _COLUMNS]], labels=labels)
    if not counts:
        yield Choice((S(0), R), (P,))


@localiser("embedding")
def local_embedding(call: LocalCall) -> fx.Node:
    """Over cut rows: own rows looked up, zeros for all others."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    if not cutting(spec, 0):
        return call.same()
    emit, index = call.emit, b["indices"]
    rows, padding = call.op.shapes[0][0], b["padding_idx"]
    safe, own = own_rows(call, index, spec, 0, rows, False)
    found = emit(call.op.node.target, b["weight"], safe, -1, b["scale_grad_by_freq"])
    if padding >= 0:  # its row is read, and gets no gradient
        ignored = emit(aten.unsqueeze.default, emit(aten.eq.Scalar, index, padding), -1)
        found = emit(aten.where.self, ignored, emit(aten.detach.default, found), found)
    mine = emit(aten.unsqueeze.default, own, -1)
    return emit(aten.where.ScalarOther, mine, found, 0.0)
