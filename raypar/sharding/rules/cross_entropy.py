"""Cross-entropy and negative log-likelihood of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.indexing import own_rows
from raypar.sharding.rules.labels import cut_choices
from raypar.sharding.rules.norms import accumulate_in, shifted_sum, sum_over
from raypar.sharding.spec import R, S, is_shard

_NONE, _MEAN = 0, 1
_NAMES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
_CLASSES = "classes"


@rule(*_NAMES)
def cross_entropy(op: OpView, size: int) -> Iterator[Choice]:
    """Samples (a partial sum where they are added up); classes (vocabulary-parallel).

    A mean over a count is no sum of parts; captured graphs have a sum and a count instead.
    """
    rank = len(op.shapes[0])
    samples: list[object] = [d for d in range(rank) if d != _dim(op)]
    logits = [None if d == _dim(op) else d for d in range(rank)]
    by_index = not op.tensors[1].meta["val"].is_floating_point()
    reduction = op.bound["reduction"]
    if reduction == _MEAN and by_index:
        return
    target = samples if by_index else logits
    weight: list[list[object]] = [[None]] * (len(op.tensors) - 2)
    out = samples if reduction == _NONE else []
    yield from cut_choices(op, [logits, target, *weight], [out], labels=samples)
    if by_index:
        yield Choice((S(_dim(op)), R, *(S(0) for _ in weight)), (R,), _CLASSES)


def _dim(op: OpView) -> int:
    return min(1, len(op.shapes[0]) - 1)


@localiser(*_NAMES)
def local_cross_entropy(call: LocalCall) -> fx.Node:
    """The same call, or the vocabulary-parallel form where classes are cut."""
    axes = cutting(call.strategy.inputs[0], _dim(call.op))
    if axes:
        return _over_classes(call, axes)
    out = call.same()
    if call.op.bound["reduction"] != _MEAN:
        return out
    parts = math.prod(
        n for s, n in zip(call.strategy.inputs[0], call.mesh, strict=True) if is_shard(s)
    )
    return call.emit(aten.mul.Scalar, out, 1 / parts)


def _over_classes(call: LocalCall, axes: list[int]) -> fx.Node:
    """Logits stay cut: a maximum, a sum and the target's logit per sample travel.

    The maximum is taken off all logits, so that none of what follows has to know it.

    The form of Megatron-LM (Shoeybi et al. 2019, section 3), with class weights and smoothing.
    """
    b, emit, dim = local_bound(call), call.emit, _dim(call.op)
    target, weight = b["target"], b["weight"]
    dtype = call.op.results[0].dtype
    wide = accumulate_in(dtype)
    log_sum: fx.Node | None = None
    if call.op.name == "cross_entropy_loss":
        x, total = shifted_sum(call, b["self"], dim, axes, R, wide)
        log_sum = emit(aten.squeeze.dim, emit(aten.log.default, total), dim)
    else:
        x = emit(aten.to.dtype, b["self"], wide)
    valid = emit(aten.ne.Scalar, target, b["ignore_index"])
    classes = call.op.shapes[0][dim]
    index, own = own_rows(call, target, call.strategy.inputs[0], dim, classes, False)
    picked = _own_sum(call, _pick(call, x, index, dim), own, axes)
    smoothing = b.get("label_smoothing", 0.0)
    if log_sum is None:
        loss = emit(aten.neg.default, picked)
    else:
        loss = emit(aten.sub.Tensor, log_sum, picked)
    if weight is not None:
        chosen = emit(aten.index.Tensor, weight, [index])
        loss = emit(aten.mul.Tensor, loss, _own_sum(call, chosen, own, axes))
    if smoothing and log_sum is not None:
        every = _smooth(call, x, log_sum, weight, dim, axes)
        rest = emit(aten.mul.Scalar, every, smoothing / classes)
        loss = emit(aten.add.Tensor, emit(aten.mul.Scalar, loss, 1 - smoothing), rest)
    loss = emit(aten.where.ScalarOther, valid, loss, 0.0)
    total_loss = loss if b["reduction"] == _NONE else emit(aten.sum.default, loss)
    same = total_loss.meta["val"].dtype == dtype
    return total_loss if same else emit(aten.to.dtype, total_loss, dtype)


def _pick(call: LocalCall, x: fx.Node, index: fx.Node, dim: int) -> fx.Node:
    emit = call.emit
    found = emit(aten.gather.default, x, dim, emit(aten.unsqueeze.default, index, dim))
    return emit(aten.squeeze.dim, found, dim)


def _own_sum(call: LocalCall, value: fx.Node, own: fx.Node, axes: list[int]) -> fx.Node:
    """What the coordinate that has it knows, for all coordinates."""
    return sum_over(call, call.emit(aten.where.ScalarOther, own, value, 0.0), axes, R)


def _smooth(
    call: LocalCall,
    x: fx.Node,
    log_sum: fx.Node,
    weight: fx.Node | None,
    dim: int,
    axes: list[int],
) -> fx.Node:
    """Sum over all classes of the weighted negative log-probabilities, ``log_sum`` less ``x``."""
    emit = call.emit
    if weight is None:
        total = emit(aten.mul.Scalar, log_sum, call.op.shapes[0][dim])
        return emit(
            aten.sub.Tensor, total, sum_over(call, emit(aten.sum.dim_IntList, x, [dim]), axes, R)
        )
    sizes = [1] * len(call.op.shapes[0])
    sizes[dim] = weight.meta["val"].shape[0]
    wide = emit(aten.mul.Tensor, x, emit(aten.reshape.default, weight, sizes))
    every = sum_over(call, emit(aten.sum.default, weight), axes, R)
    inner = sum_over(call, emit(aten.sum.dim_IntList, wide, [dim]), axes, R)
    return emit(aten.sub.Tensor, emit(aten.mul.Tensor, log_sum, every), inner)
