"""Ops on two values: bilinear maps, outer products, distances; and normalised weights."""

from __future__ import annotations

from collections.abc import Iterator

from raypar.sharding.rules.base import Choice, OpView, rule
from raypar.sharding.spec import RG, P, S


@rule("bilinear")
def bilinear(op: OpView, size: int) -> Iterator[Choice]:
    """Rows; output features; either side's input features (a partial sum)."""
    last = len(op.out) - 1
    bias = len(op.tensors) == 4
    for d in range(last):
        yield Choice((S(d), S(d), RG, *(RG,) * bias), (S(d),))
    yield Choice((RG, RG, S(0), *(S(0),) * bias), (S(last),))
    yield Choice((S(last), RG, S(1), *(P,) * bias), (P,))
    yield Choice((RG, S(last), S(2), *(P,) * bias), (P,))


@rule("outer", "ger")
def outer(op: OpView, size: int) -> Iterator[Choice]:
    """Either side."""
    yield Choice((S(0), RG), (S(0),))
    yield Choice((RG, S(0)), (S(1),))


@rule("cdist", "_cdist_forward")
def cdist(op: OpView, size: int) -> Iterator[Choice]:
    """Rows of either side; dims before them that both have."""
    left, right = op.shapes
    last = len(op.out) - 1
    if len(left) != len(right):
        return
    for d in range(last - 1):
        if left[d] == right[d]:
            yield Choice((S(d), S(d)), (S(d),))
    yield Choice((S(last - 1), RG), (S(last - 1),))
    yield Choice((RG, S(last - 1)), (S(last),))


@rule("cosine_similarity", "pairwise_distance")
def pairs(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim but the one that is summed over."""
    left, right = op.shapes
    if left != right:
        return
    dim = op.bound["dim"] % len(left) if "dim" in op.bound else len(left) - 1
    keeps = len(op.out) == len(left)
    for d in range(len(left)):
        if d != dim:
            yield Choice((S(d), S(d)), (S(d if keeps else d - (d > dim)),))


@rule("_weight_norm")
def weight_norm(op: OpView, size: int) -> Iterator[Choice]:
    """The dim whose slices have a norm each."""
    dim = op.bound["dim"] % len(op.out)
    if op.shapes[1][dim] == op.out[dim]:
        yield Choice((S(dim), S(dim)), (S(dim),))
