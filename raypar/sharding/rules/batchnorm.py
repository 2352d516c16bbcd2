"""Batch norm with statistics of the whole batch, and instance norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

import raypar.sharding.batchnorm  # noqa: F401  (registers the ops that the local call is made of)
from raypar.sharding.rules._local import local_bound
from raypar.sharding.rules.base import Choice, LocalCall, OpView, is_tensor, localiser, rule
from raypar.sharding.spec import RG, R, S, ShardingSpec, State, is_shard, shard_dim

_FUNCTIONAL = "_native_batch_norm_legit_functional"
_BUFFERS = ("running_mean", "running_var")


def _inputs(op: OpView, x: State, learned: State, buffer: State) -> tuple[State, ...]:
    """A state for every tensor that is given."""
    states = {"input": x, "weight": learned, "bias": learned, **dict.fromkeys(_BUFFERS, buffer)}
    return tuple(s for name, s in states.items() if isinstance(op.bound[name], fx.Node))


@rule(_FUNCTIONAL)
def training(op: OpView, size: int) -> Iterator[Choice]:
    """Channels; every other dim with statistics put together over the parts."""
    yield Choice(_inputs(op, S(1), S(0), S(0)), (S(1), *(S(0),) * 4))
    for dim in range(len(op.out)):
        if dim != 1:
            yield Choice(_inputs(op, S(dim), RG, R), (S(dim), R, R, R, R))


@localiser(_FUNCTIONAL)
def local_training(call: LocalCall) -> fx.Node:
    """One all-gather of the parts' moments forward, one reduce-scatter of their gradients back."""
    x_spec = call.strategy.inputs[0]
    over = [axis for axis, dim in x_spec.shards() if dim != 1]
    if not over or not call.op.bound["training"]:
        return call.same()
    b = local_bound(call)
    own = ShardingSpec(S(0) if is_shard(s) and shard_dim(s) != 1 else R for s in x_spec)
    every = ShardingSpec(RG if is_shard(s) else R for s in own)
    moments = call.emit(torch.ops.raypar.moments.default, b["input"])
    moments = call.convert(moments, own, every)
    whole = call.op.shapes[0]
    return call.emit(
        torch.ops.raypar.batch_norm_by.default,
        b["input"], moments, b["weight"], b["bias"], b["running_mean"], b["running_var"],
        b["momentum"], b["eps"], math.prod(whole) // whole[1],
    )  # fmt: skip


@rule("batch_norm")
def evaluation(op: OpView, size: int) -> Iterator[Choice]:
    """With given statistics: every dim."""
    if op.bound["training"]:
        return
    yield Choice(_inputs(op, S(1), S(0), S(0)), (S(1),))
    for dim in range(len(op.out)):
        if dim != 1:
            yield Choice(_inputs(op, S(dim), RG, R), (S(dim),))


@rule("instance_norm")
def instance_norm(op: OpView, size: int) -> Iterator[Choice]:
    """Samples and channels (with statistics of every image alone)."""
    if not op.bound["use_input_stats"] or is_tensor(op.bound["running_mean"]):
        return
    yield Choice(_inputs(op, S(0), RG, R), (S(0),))
    yield Choice(_inputs(op, S(1), S(0), S(0)), (S(1),))
