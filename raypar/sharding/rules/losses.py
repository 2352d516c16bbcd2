"""Losses that are sums (or means) over elements, or over rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.spec import RG, P, S, State, is_shard

_NONE, _MEAN = 0, 1
_ELEMENTS = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss", "poisson_nll_loss",
    "margin_ranking_loss", "hinge_embedding_loss",
)  # fmt: skip
_ROWS = (
    "triplet_margin_loss", "cosine_embedding_loss", "multi_margin_loss", "multilabel_margin_loss",
)  # fmt: skip


@rule(*_ELEMENTS)
def elements(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; what is added up over a cut dim is a partial sum."""
    full = tuple(torch.broadcast_shapes(*op.shapes))
    reduced = op.bound["reduction"] != _NONE
    for d, n in enumerate(full):
        if n == 1:
            continue
        states = tuple(_aligned(shape, full, d, n) for shape in op.shapes)
        yield Choice(states, (P if reduced else S(d),))


def _aligned(shape: tuple[int, ...], full: tuple[int, ...], dim: int, size: int) -> State:
    """How a tensor lies that is broadcast to `full`, where `dim` is cut."""
    at = dim - (len(full) - len(shape))
    return S(at) if at >= 0 and shape[at] == size else RG


@rule(*_ROWS)
def rows(op: OpView, size: int) -> Iterator[Choice]:
    """Rows; a weight per class is shared by all."""
    first = op.shapes[0]
    if len(first) != 2 or any(not s or s[0] != first[0] for s in _by_row(op)):
        return
    weight = op.bound.get("weight")
    states = tuple(RG if t is weight else S(0) for t in op.tensors)
    yield Choice(states, (P if op.bound["reduction"] != _NONE else S(0),))


def _by_row(op: OpView) -> list[tuple[int, ...]]:
    weight = op.bound.get("weight")
    return [s for t, s in zip(op.tensors, op.shapes, strict=True) if t is not weight]


@localiser(*_ELEMENTS, *_ROWS)
def local_loss(call: LocalCall) -> fx.Node:
    """The mean over a part counts as much as the part."""
    out = call.same()
    if call.op.bound["reduction"] != _MEAN:
        return out
    parts = math.prod(
        size
        for i, size in enumerate(call.mesh)
        if any(is_shard(s[i]) for s in call.strategy.inputs)
    )
    return call.emit(aten.mul.Scalar, out, 1 / parts)
