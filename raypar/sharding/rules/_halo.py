"""Sliding windows over a dim that is cut: every part gets the rows of its neighbours."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import only_dim, parts_of
from raypar.sharding.rules.base import LocalCall
from raypar.sharding.spec import ShardingSpec


class Window(NamedTuple):
    """What a tile of a sliding window's output reads beyond the same tile of its input.

    Attributes:
        before: Rows of the neighbour before; at the border, the padding.
        after: Rows of the neighbour after; at the border, the padding.
    """

    before: int
    after: int


def window(
    inside: int, outside: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Window | None:
    """The window of an op whose output tiles are its input tiles, `stride` times smaller.

    Args:
        inside: Rows of the whole input.
        outside: Rows of the whole output.
        kernel: Rows of the kernel.
        stride: Step of the kernel.
        padding: Rows of padding before the first row.
        dilation: Step within the kernel.

    Returns:
        None where tiles of input and output do not lie on top of each other.
    """
    after = dilation * (kernel - 1) + 1 - stride - padding
    if outside * stride != inside or after <= -stride:
        return None
    return Window(padding, max(after, 0))


def exchange(
    call: LocalCall, x: fx.Node, spec: ShardingSpec, dim: int, halo: Window, fill: float = 0.0
) -> fx.Node:
    """Puts the neighbours' rows around a cut dim; `fill` where there is no neighbour.

    The parts' edges are gathered, moved on by one part, and cut again, so that forward and backward
    cost one all-gather of the edges each (over an axis that cuts the dim).

    Args:
        call: The call that is being written.
        x: Local value.
        spec: How it lies.
        dim: The dim, cut in one block.
        halo: Rows to add; not more than a part has.
        fill: Padding beyond the first and the last part.
    """
    width = halo.before + halo.after
    if width == 0:
        return x
    emit, value = call.emit, x.meta["val"]
    length, parts = value.shape[dim], parts_of(spec, dim, call.mesh)
    cut, whole = only_dim(spec, dim), ShardingSpec.replicated(len(spec))
    last = emit(aten.slice.Tensor, x, dim, length - halo.before, length)
    first = emit(aten.slice.Tensor, x, dim, 0, halo.after)
    edges = call.convert(emit(aten.cat.default, [last, first], dim), cut, whole)
    shape = list(value.shape)
    edges = emit(aten.reshape.default, edges, [*shape[:dim], parts, width, *shape[dim + 1 :]])
    sides = []
    for low, high, step in ((0, halo.before, 1), (halo.before, width, -1)):
        side = emit(aten.slice.Tensor, edges, dim + 1, low, high)
        border = [*shape[:dim], 1, high - low, *shape[dim + 1 :]]
        beyond = emit(aten.new_full.default, x, border, fill)
        if step == 1:
            kept = emit(aten.slice.Tensor, side, dim, 0, parts - 1)
            sides.append(emit(aten.cat.default, [beyond, kept], dim))
        else:
            kept = emit(aten.slice.Tensor, side, dim, 1, parts)
            sides.append(emit(aten.cat.default, [kept, beyond], dim))
    both = emit(aten.cat.default, sides, dim + 1)
    both = emit(aten.reshape.default, both, [*shape[:dim], parts * width, *shape[dim + 1 :]])
    own = call.convert(both, whole, cut)
    head = emit(aten.slice.Tensor, own, dim, 0, halo.before)
    tail = emit(aten.slice.Tensor, own, dim, halo.before, width)
    return emit(aten.cat.default, [head, x, tail], dim)
