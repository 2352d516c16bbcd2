"""Sums, means and other reductions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from raypar.graph.passes.emit import aten
from raypar.sharding.rules.base import Choice, LocalCall, OpView, localiser, rule
from raypar.sharding.rules.labels import aligned, cut_choices, is_float, linear_choices
from raypar.sharding.spec import P, is_shard

_LINEAR = ("sum", "nansum", "mean")
_OTHERS = (
    "amax", "amin", "max", "min", "aminmax", "prod", "var", "std", "var_mean", "std_mean",
    "logsumexp", "special_logsumexp", "any", "all", "norm",
    "linalg_vector_norm", "count_nonzero", "nanmean",
)  # fmt: skip


@rule(*_LINEAR)
def add_up(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim; over a cut dim that is added up, and from partial sums, a partial sum."""
    before, after, _ = _labels(op)
    yield from cut_choices(op, [before], [after])
    if is_float(op.tensors[0]) and op.name != "nansum":
        yield from linear_choices(op, [0])


@localiser("mean")
def local_mean(call: LocalCall) -> fx.Node:
    """The mean over a part counts as much as the part."""
    source, result = call.strategy.inputs[0], call.strategy.outputs[0]
    parts = math.prod(
        n for s, r, n in zip(source, result, call.mesh, strict=True) if is_shard(s) and r == P
    )
    out = call.same()
    return out if parts == 1 else call.emit(aten.mul.Scalar, out, 1 / parts)


@rule(*_OTHERS)
def reduce(op: OpView, size: int) -> Iterator[Choice]:
    """Every dim that is not reduced."""
    if len(op.tensors) == 2:  # max(a, b): a function of single elements
        out = list(range(len(op.out)))
        yield from cut_choices(op, aligned(op, op.out), [out])
        return
    before, after, reduced = _labels(op)
    kept = [x for x in before if x not in reduced]
    yield from cut_choices(op, [before], [after] * len(op.results), labels=kept)


def _labels(op: OpView) -> tuple[list[object], list[object], set[object]]:
    """Labels of the input and the result of a reduction, and those that are reduced."""
    rank = len(op.shapes[0])
    before: list[object] = list(range(rank))
    given = op.bound.get("dim")
    if given is None or (isinstance(given, list | tuple) and not given):
        reduced: set[object] = set(before)
    else:
        items = given if isinstance(given, list | tuple) else [given]
        reduced = {int(d) % max(rank, 1) for d in items}
    if op.bound.get("keepdim"):
        return before, [None if x in reduced else x for x in before], reduced
    return before, [x for x in before if x not in reduced], reduced
