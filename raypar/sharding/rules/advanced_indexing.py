"""Indexing with several tensors at once: ``value[i, :, j]`` and writes to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.indexing import floating, masked, own_rows
from raypar.sharding.spec import RG, P, R, S, State, is_shard


class _Indexed:
    """Where the dims of ``value[indices]`` come from.

    Attributes:
        dims: Dims of the value that an index picks from, in order.
        width: Dims that the indices make together.
        at: The first of those dims in the result.
        kept: Dim of the value that is kept whole → its dim in the result.
    """

    def __init__(self, op: OpView) -> None:
        indices = op.bound["indices"]
        self.dims = [d for d, index in enumerate(indices) if isinstance(index, fx.Node)]
        self.nodes = [indices[d] for d in self.dims]
        self.shapes = [tuple(n.meta["val"].shape) for n in self.nodes]
        self.width = max((len(s) for s in self.shapes), default=0)
        together = self.dims == list(range(self.dims[0], self.dims[-1] + 1)) if self.dims else False
        self.at = self.dims[0] if together else 0
        ndim = len(op.bound["self"].meta["val"].shape)
        rest = [d for d in range(ndim) if d not in self.dims]
        self.kept = {d: i if i < self.at else i + self.width for i, d in enumerate(rest)}

    @property
    def plain(self) -> bool:
        """Whether all indices are integers of a known shape."""
        ints = all(n.meta["val"].dtype in (torch.int64, torch.int32) for n in self.nodes)
        return bool(self.nodes) and ints

    def states(self, k: int, size: int) -> list[State] | None:
        """How the indices lie where dim `k` of what they make is cut."""
        found: list[State] = []
        for shape in self.shapes:
            d = k - (self.width - len(shape))
            found.append(S(d) if d >= 0 and shape[d] == size else R)
        return found if any(is_shard(s) for s in found) else None

    def made(self) -> tuple[object, ...]:
        """The shape that the indices make together."""
        sizes: list[object] = [1] * self.width
        for shape in self.shapes:
            for d, n in enumerate(reversed(shape)):
                if not isinstance(n, int) or n != 1:
                    sizes[self.width - 1 - d] = n
        return tuple(sizes)


@rule("index", "_unsafe_index")
def index(op: OpView, size: int) -> Iterator[Choice]:
    """Dims without an index; dims of the indices; a dim that is picked from (a partial sum)."""
    found = _Indexed(op)
    if not found.plain:
        return
    whole = (R,) * len(found.nodes)
    for d, to in found.kept.items():
        yield Choice((S(d), *whole), (S(to),))
    for k, n in enumerate(found.made()):
        states = found.states(k, n) if isinstance(n, int) else None
        if states is not None:
            yield Choice((RG, *states), (S(found.at + k),))
    if floating(op.tensors[0]):
        yield Choice((P, *whole), (P,))
        for d in found.dims:
            yield Choice((S(d), *whole), (P,))


@localiser("index", "_unsafe_index")
def local_index(call: LocalCall) -> fx.Node:
    """What other parts have is zero."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    found, shape = _Indexed(call.op), call.op.shapes[0]
    indices = list(b["indices"])
    masks: list[fx.Node] = []
    for d in found.dims:
        if cutting(spec, d):
            indices[d], own = own_rows(call, indices[d], spec, d, shape[d], negative=True)
            masks.append(own)
    picked = call.emit(aten.index.Tensor, b["self"], indices)
    after = len(call.op.out) - found.at - found.width
    for own in masks:
        for _ in range(after):
            own = call.emit(aten.unsqueeze.default, own, -1)
        picked = masked(call, picked, own)
    return picked


@rule("index_put", "_unsafe_index_put")
def index_put(op: OpView, size: int) -> Iterator[Choice]:
    """Dims behind those that are written to by index; sums pass partial sums through."""
    found = _Indexed(op)
    whole = (R,) * len(found.nodes)
    if not found.plain or found.dims != list(range(len(found.dims))):
        return
    values = op.shapes[-1]
    for d, to in found.kept.items():
        at = to - (len(op.out) - len(found.dims) + found.width - len(values))
        if at < 0 or values[at] == 1:
            yield Choice((S(d), *whole, RG), (S(d),))
        else:
            yield Choice((S(d), *whole, S(at)), (S(d),))
    if floating(op.tensors[0]) and op.bound["accumulate"]:
        yield Choice((P, *whole, P), (P,))
