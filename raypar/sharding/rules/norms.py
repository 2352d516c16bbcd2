"""Softmax and normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.convert import ALL_MAX, NONE
from raypar.sharding.rules._local import cutting, local_bound, parts_of
from raypar.sharding.rules.base import (
    Choice,
    LocalCall,
    OpView,
    Strategy,
    combination,
    localiser,
    rule,
)
from raypar.sharding.rules.labels import cut_choices, dims
from raypar.sharding.spec import RG, P, R, S, ShardingSpec, State

_SOFTMAXES = (
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "special_softmax",
    "special_log_softmax",
)


@rule(*_SOFTMAXES)
def softmax(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; its own with a maximum and a sum over the coordinates."""
    labels = dims(op.out)
    yield from cut_choices(op, [labels], [labels])


@localiser(*_SOFTMAXES)
def local_softmax(call: LocalCall) -> fx.Node:
    """Over a cut dim: exponentials below the common maximum, divided by their common sum.

    Only the maximum and the sum travel (Megatron-LM, Shoeybi et al. 2019, section 3).
    """
    dim = call.op.bound["dim"] % max(len(call.op.out), 1)
    axes = cutting(call.strategy.inputs[0], dim)
    if not axes:
        return call.same()
    emit, result = call.emit, call.op.results[0]
    wide = accumulate_in(result.dtype)
    below, total = shifted_sum(call, call.args[0], dim, axes, RG, wide)
    if "log" in call.op.name:
        out = emit(aten.sub.Tensor, below, emit(aten.log.default, total))
    else:
        out = emit(aten.div.Tensor, emit(aten.exp.default, below), total)
    return out if wide == result.dtype else emit(aten.to.dtype, out, result.dtype)


def shifted_sum(
    call: LocalCall,
    x: fx.Node,
    dim: int,
    axes: Sequence[int],
    state: State,
    wide: torch.dtype,
) -> tuple[fx.Node, fx.Node]:
    """``x`` less its maximum over a cut dim, and the sum of the exponentials of that.

    Half-precision ``x`` is not widened first: its maximum is, and so is the difference with it.

    Args:
        call: The call that is being written.
        x: Value, dim `dim` of which is cut over `axes`.
        dim: The dim.
        axes: The mesh axes.
        state: In which the sum is read: ``Rg`` by work on the parts, ``R`` by work that every
            coordinate does alike.
        wide: Dtype of the results.
    """
    emit = call.emit
    own: torch.dtype = x.meta["val"].dtype
    if torch.promote_types(own, wide) != wide:
        x = emit(aten.to.dtype, x, wide)
    top = emit(aten.amax.default, emit(aten.detach.default, x), [dim], True)
    if top.meta["val"].dtype != wide:
        top = emit(aten.to.dtype, top, wide)
    for axis in axes:
        name, size = call.axes[axis]
        top = emit(torch.ops.raypar.convert.default, top, ALL_MAX, NONE, "", "", name, size)
        top.meta.pop("autocast", None)
    below = emit(aten.sub.Tensor, x, top)
    part = emit(aten.sum.dim_IntList, emit(aten.exp.default, below), [dim], True)
    return below, sum_over(call, part, axes, state)


def sum_over(call: LocalCall, part: fx.Node, axes: Sequence[int], state: State) -> fx.Node:
    """The sum of a partial sum over some axes, read in `state`."""
    every = range(len(call.axes))
    source = ShardingSpec(P if axis in axes else R for axis in every)
    return call.convert(part, source, ShardingSpec(state if a in axes else R for a in every))


def accumulate_in(dtype: torch.dtype) -> torch.dtype:
    """In which dtype sums of exponentials are taken: at least float32, as torch does."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@rule("layer_norm", "rms_norm")
def layer_norm(op: OpView, size: int) -> Iterator[Choice]:
    """Dims that are not normalised (S1 of (batch, sequence, features): sequence parallelism)."""
    lead = len(op.out) - len(op.bound["normalized_shape"])
    labels: list[object] = [d if d < lead else None for d in range(len(op.out))]
    affine = [[None] * len(shape) for shape in op.shapes[1:]]
    yield from cut_choices(op, [labels, *affine], [labels])


@rule("group_norm")
def group_norm(op: OpView, size: int) -> Iterator[Choice]:
    """Samples; whole groups of channels."""
    affine = len(op.tensors) - 1
    yield Choice((S(0), *(RG,) * affine), (S(0),))
    if op.bound["num_groups"] % size == 0:
        yield Choice((S(1), *(S(0),) * affine), (S(1),))


@combination("group_norm")
def whole_groups(op: OpView, strategy: Strategy, mesh: Sequence[int]) -> bool:
    """The groups divide by all axes that cut the channels."""
    return bool(op.bound["num_groups"] % parts_of(strategy.inputs[0], 1, mesh) == 0)


@localiser("group_norm")
def local_group_norm(call: LocalCall) -> fx.Node:
    """As many groups as are left."""
    parts = parts_of(call.strategy.inputs[0], 1, call.mesh)
    return call.again(num_groups=local_bound(call)["num_groups"] // parts)
