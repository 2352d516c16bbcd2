"""Ops along one dim: sorting, choosing, cumulative sums, one-hot codes, triangles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound, only_dim
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.spec import RG, P, R, S, ShardingSpec


@rule(
    "topk", "sort", "argsort", "msort", "kthvalue", "mode", "median", "nanmedian",
    "cumprod", "logcumsumexp", "cummax", "cummin",
)  # fmt: skip
def along(op: OpView, size: int) -> Iterator[Choice]:
    """Every other dim."""
    shape = op.shapes[0]
    dim = _dim(op)
    if dim is None:
        return
    keeps = len(op.out) == len(shape)
    for d in range(len(shape)):
        if d != dim:
            yield Choice((S(d),), (S(d if keeps else d - (d > dim)),) * len(op.results))


@rule("argmax", "argmin")
def choose(op: OpView, size: int) -> Iterator[Choice]:
    """Every other dim."""
    if op.bound["dim"] is not None:
        yield from along(op, size)


def _dim(op: OpView) -> int | None:
    """The dim that the op works along; None where it is all of them."""
    ndim = len(op.shapes[0])
    if op.name == "msort":
        return 0
    dim = op.bound.get("dim", None if op.name in ("median", "nanmedian") else -1)
    return dim % ndim if isinstance(dim, int) and ndim else None


@rule("cumsum")
def cumsum(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; its own one with the totals of the parts before."""
    for d in range(len(op.out)):
        yield Choice((S(d),), (S(d),))
    if op.results[0].is_floating_point() and op.tensors[0].meta["val"].is_floating_point():
        yield Choice((P,), (P,))


@localiser("cumsum")
def local_cumsum(call: LocalCall) -> fx.Node:
    """The parts' totals are gathered, summed up to the own part, and added."""
    b, spec, emit = local_bound(call), call.strategy.inputs[0], call.emit
    dim = b["dim"] % len(call.op.out)
    own = call.same()
    if not cutting(spec, dim):
        return own
    length = own.meta["val"].shape[dim]
    total = emit(aten.slice.Tensor, own, dim, length - 1, length)
    cut, whole = only_dim(spec, dim), ShardingSpec.replicated(len(spec))
    totals = call.convert(total, cut, whole)
    before = emit(aten.sub.Tensor, emit(aten.cumsum.default, totals, dim), totals)
    return emit(aten.add.Tensor, own, call.convert(before, whole, cut))


@rule("one_hot")
def one_hot(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim of the indices; the classes."""
    last = len(op.out) - 1
    for d in range(last):
        yield Choice((S(d),), (S(d),))
    if op.bound["num_classes"] > 0:
        yield Choice((R,), (S(last),))


@localiser("one_hot")
def local_one_hot(call: LocalCall) -> fx.Node:
    """Codes of the own classes; an index of another part's class has none."""
    b, spec, emit = local_bound(call), call.strategy.outputs[0], call.emit
    last = len(call.op.out) - 1
    if not cutting(spec, last):
        return call.same()
    index, classes = b["self"], b["num_classes"]
    for axis in cutting(spec, last):
        name, size = call.axes[axis]
        classes //= size
        index = emit(torch.ops.raypar.shift_index.default, index, classes, name)
    like = index.meta["val"].new_empty([classes])
    options = {"dtype": torch.int64, "device": like.device}
    numbers = emit(aten.arange.default, classes, like=like, **options)
    hit = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, index, -1), numbers)
    return emit(aten.to.dtype, hit, torch.int64)


@rule("tril", "triu")
def triangle(op: OpView, size: int) -> Iterator[Choice]:
    """Dims before the matrix; any partial sum."""
    for d in range(len(op.out) - 2):
        yield Choice((S(d),), (S(d),))
    if op.results[0].is_floating_point():
        yield Choice((P,), (P,))


@rule("bucketize", "searchsorted")
def bucketize(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim of the values, the boundaries being shared by all."""
    values, boundaries = (0, 1) if op.name == "bucketize" else (1, 0)
    if len(op.tensors) != 2 or len(op.shapes[boundaries]) != 1:
        return
    for d in range(len(op.out)):
        states = (S(d), R) if values == 0 else (R, S(d))
        yield Choice(states, (S(d),))


@rule("roll", "flip")
def moved(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that stay in place; any partial sum."""
    ndim = len(op.out)
    dims = op.bound["dims"]
    if not dims:
        return  # rolls over the flattened value
    moving = {d % ndim for d in dims}
    for d in range(ndim):
        if d not in moving:
            yield Choice((S(d),), (S(d),))
    if op.results[0].is_floating_point():
        yield Choice((P,), (P,))


@rule(
    *(f"fft_{name}" for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")),
    *(f"fft_{name}{many}" for name in ("fft", "ifft", "rfft", "irfft") for many in ("2", "n")),
)
def fourier(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim that is not transformed."""
    dims = op.bound["dim"]
    if dims is None:
        return
    ndim = len(op.out)
    transformed = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    for d in range(ndim):
        if d not in transformed:
            yield Choice((S(d),), (S(d),))


@rule("quantile", "nanquantile")
def quantile(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but the one whose quantiles are taken; a list of them makes a new first dim."""
    shape, dim = op.shapes[0], op.bound["dim"]
    if dim is None:
        return
    dim %= len(shape)
    wanted = op.bound["q"]
    several = isinstance(wanted, fx.Node) and len(wanted.meta["val"].shape) == 1
    keeps = op.bound["keepdim"]
    for d in range(len(shape)):
        if d != dim:
            to = (d if keeps else d - (d > dim)) + several
            yield Choice((S(d), *(RG,) * isinstance(wanted, fx.Node)), (S(to),))
