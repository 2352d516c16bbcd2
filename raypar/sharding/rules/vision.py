"""Convolutions: over samples, channels, groups and tiles of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._halo import Window, exchange, window
from raypar.sharding.rules._local import cutting, local_bound, parts_of, per_dim
from raypar.sharding.rules.base import (
    Choice,
    LocalCall,
    OpView,
    Strategy,
    combination,
    localiser,
    rule,
)
from raypar.sharding.spec import RG, P, S, cut_of, is_shard

_CONV = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@rule(*_CONV)
def convolution(op: OpView, size: int) -> Iterator[Choice]:
    """Samples; whole groups; output or input channels of every group; tiles with halos."""
    if len(op.shapes[0]) != len(op.shapes[1]):
        return  # no dim of samples
    groups, bias = op.bound["groups"], len(op.tensors) == 3
    yield Choice((S(0), RG, *(RG,) * bias), (S(0),))
    if groups > 1 and groups % size == 0:
        yield Choice((S(1), S(0), *(S(0),) * bias), (S(1),))
    for g in (groups,) if groups > 1 else op.blocks(1):
        yield Choice((RG, S(0, g), *(S(0, g),) * bias), (S(1, g),))
    yield Choice((S(1, groups), S(1), *(P,) * bias), (P,))
    for dim in range(2, len(op.out)):
        if _tiles(op, dim, size):
            yield Choice((S(dim), RG, *(RG,) * bias), (S(dim),))


@rule(*_TRANSPOSED)
def transposed(op: OpView, size: int) -> Iterator[Choice]:
    """As `convolution`; the weight is ``[in, out / groups, ...]``."""
    if len(op.shapes[0]) != len(op.shapes[1]):
        return
    groups, bias = op.bound["groups"], len(op.tensors) == 3
    yield Choice((S(0), RG, *(RG,) * bias), (S(0),))
    if groups > 1 and groups % size == 0:
        yield Choice((S(1), S(0), *(S(0),) * bias), (S(1),))
    yield Choice((RG, S(1), *(S(0, groups),) * bias), (S(1, groups),))
    yield Choice((S(1, groups), S(0, groups), *(P,) * bias), (P,))
    for dim in range(2, len(op.out)):
        if _tiles(op, dim, size):
            yield Choice((S(dim), RG, *(RG,) * bias), (S(dim),))


@combination(*_CONV, *_TRANSPOSED)
def together(op: OpView, strategy: Strategy, mesh: Sequence[int]) -> bool:
    """Groups divide by all axes that cut them; halos fit into the parts."""
    groups = op.bound["groups"]
    x = strategy.inputs[0]
    if groups > 1:
        cuts = {cut_of(s)[1] for spec in (x, strategy.outputs[0]) for s in spec if _at(s, 1)}
        if len(cuts) > 1:
            return False  # groups cut, and then the channels of what is left of them
        if cuts == {1} and groups % parts_of(x, 1, mesh):
            return False
    return all(
        _tiles(op, dim, parts_of(x, dim, mesh)) for dim in range(2, len(op.out)) if cutting(x, dim)
    )


@localiser(*_CONV)
def local_convolution(call: LocalCall) -> fx.Node:
    """Fewer groups where they are cut; rows of the neighbours in place of padding."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    x, op = b["input"], call.op
    count = len(op.out) - 2
    groups = _local_groups(call, b["groups"])
    low, high = _padding(op.bound, op.shapes[1], count)
    for i in range(count):
        if not cutting(spec, 2 + i):
            continue
        halo = _window(op, 2 + i)
        assert halo is not None
        x = exchange(call, x, spec, 2 + i, halo)
        low[i] = high[i] = 0
    if low != high:  # an even kernel with padding="same"
        extra = [n for i in reversed(range(count)) for n in (0, high[i] - low[i])]
        x = call.emit(aten.constant_pad_nd.default, x, extra)
    target = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[count].default
    options = (b["stride"], low, b["dilation"], groups)
    return call.emit(target, x, b["weight"], b["bias"], *options)


@localiser(*_TRANSPOSED)
def local_transposed(call: LocalCall) -> fx.Node:
    """As `local_convolution`; a tile is cut out of what its rows and the neighbours' make."""
    b, spec = local_bound(call), call.strategy.inputs[0]
    x, op = b["input"], call.op
    count = len(op.out) - 2
    stride, padding, more, _ = _transposed_options(op.bound, count)
    crops: list[tuple[int, int]] = []
    for i in range(count):
        if not cutting(spec, 2 + i):
            continue
        halo = _window(op, 2 + i)
        assert halo is not None
        x = exchange(call, x, spec, 2 + i, halo)
        crops.append((2 + i, halo.before * stride[i] + padding[i]))
        padding[i] = more[i] = 0
    options = (stride, padding, more, _local_groups(call, b["groups"]), b["dilation"])
    out = call.emit(op.node.target, x, b["weight"], b["bias"], *options)
    wanted = call.local_out()
    for dim, start in crops:
        out = call.emit(aten.slice.Tensor, out, dim, start, start + wanted[dim])
    return out


def _at(state: str, dim: int) -> bool:
    return is_shard(state) and cut_of(state)[0] == dim


def _local_groups(call: LocalCall, groups: int) -> int:
    """Groups of the local call: fewer where the channels are cut in one block."""
    spec = call.strategy.inputs[0]
    if groups == 1 or S(1) not in spec:
        return groups
    return groups // parts_of(spec, 1, call.mesh)


def _tiles(op: OpView, dim: int, parts: int) -> bool:
    """Whether a dim of the image may be cut in that many parts."""
    halo = _window(op, dim)
    if halo is None or op.shapes[0][dim] % parts:
        return False
    return max(halo) <= op.shapes[0][dim] // parts


def _window(op: OpView, dim: int) -> Window | None:
    x, weight = op.shapes[:2]
    count, i = len(op.out) - 2, dim - 2
    kernel = weight[dim]
    if op.name in _TRANSPOSED:
        stride, padding, _, dilation = (v[i] for v in _transposed_options(op.bound, count))
        return _spread(x[dim], op.out[dim], kernel, stride, padding, dilation)
    stride = per_dim(op.bound["stride"], count, 1)[i]
    dilation = per_dim(op.bound["dilation"], count, 1)[i]
    low, _ = _padding(op.bound, weight, count)
    return window(x[dim], op.out[dim], kernel, stride, low[i], dilation)


def _spread(
    inside: int, outside: int, kernel: int, stride: int, padding: int, dilation: int
) -> Window | None:
    """Rows that reach into an output tile: row r lands on r * stride - padding + j * dilation."""
    if outside != inside * stride:
        return None
    reach = dilation * (kernel - 1)
    before = max((reach - padding) // stride, 0)
    after = -(-padding // stride)
    # Without padding the extended tile makes (rows - 1) * stride + reach + 1 rows of output.
    while (after - 1) * stride + reach + 1 < padding:
        after += 1
    return Window(before, after)


def _transposed_options(
    bound: dict[str, Any], count: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    names = (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    stride, padding, more, dilation = (per_dim(bound[n], count, d) for n, d in names)
    return stride, padding, more, dilation


def _padding(
    bound: dict[str, Any], weight: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """Rows of padding before and after every dim of the image."""
    padding = bound["padding"]
    if padding == "valid":
        return [0] * count, [0] * count
    if padding == "same":
        dilation = per_dim(bound["dilation"], count, 1)
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    both = per_dim(padding, count, 0)
    return list(both), list(both)
