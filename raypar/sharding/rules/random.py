"""Random numbers: every part draws what the whole would have drawn there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules._local import cutting, local_bound, only_dim, parts_of
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.spec import R, S, ShardingSpec


@rule("seeded")
def seeded(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim. A part of the samples draws only its own rows, other parts draw all of theirs."""
    for dim in range(len(op.out)):
        yield Choice((R,), (S(dim),))


@localiser("seeded")
def local_seeded(call: LocalCall) -> fx.Node:
    """The index of the first sample moves with the coordinate; other cuts come after drawing."""
    b, spec = local_bound(call), call.strategy.outputs[0]
    shape, samples, rng = list(b["shape"]), b["samples"], b["rng"]
    dim = sample_dim(shape, samples, b["before"]) if b["keyed"] else None
    parts = 1 if dim is None else parts_of(spec, dim, call.mesh)
    drawn = ShardingSpec.replicated(len(spec))
    if dim is not None and samples % parts == 0:
        rng = _shifted(call, rng, spec, dim, samples)
        shape[dim], samples = shape[dim] // parts, samples // parts
        drawn = only_dim(spec, dim)
    options = (b["before"], b["keyed"], b["kind"], b["p"], b["dtype"], b["device"])
    out = call.emit(call.op.node.target, rng, b["key"], shape, samples, *options)
    return call.convert(out, drawn, spec)


def sample_dim(shape: Sequence[int], samples: int, before: int) -> int | None:
    """The dim whose equal parts hold whole samples, where samples come first in it."""
    for dim in range(len(shape)):
        if math.prod(shape[:dim]) == before and shape[dim] % samples == 0 and samples > 1:
            return dim
    return None


def _shifted(call: LocalCall, rng: fx.Node, spec: ShardingSpec, dim: int, rows: int) -> fx.Node:
    """``[seed, step, first sample]`` for the own part of the samples."""
    axes = cutting(spec, dim)
    if not axes:
        return rng
    first = call.emit(aten.slice.Tensor, rng, 0, 2, 3)
    for axis in axes:
        name, size = call.axes[axis]
        rows //= size
        first = call.emit(torch.ops.raypar.shift_index.default, first, -rows, name)
    return call.emit(aten.cat.default, [call.emit(aten.slice.Tensor, rng, 0, 0, 2), first])
