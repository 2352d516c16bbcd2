"""Choices that follow from naming the dims of an op.

An op like an einsum is described by a label for every dim of its tensors. Cutting a label cuts that
dim wherever the label stands; a floating-point input without the label is read whole by every
coordinate for its own part of the work, so that its gradient is a partial sum (``Rg``); a result
without the label is a sum of what the coordinates have, a partial sum too (``P``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from raypar.sharding.rules.base import Choice, OpView
from raypar.sharding.spec import RG, P, R, S, State

Labels = Sequence[object]
"""A label for every dim of a tensor; None where the dim may not be cut."""


def is_float(node: fx.Node) -> bool:
    """Whether a tensor may have a gradient."""
    return _has_gradient(node.meta["val"])


def _has_gradient(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def whole(node: fx.Node) -> State:
    """How an input is read that all coordinates need while the work is cut."""
    return RG if is_float(node) else R


def cut_choices(
    op: OpView,
    inputs: Sequence[Labels],
    outputs: Sequence[Labels],
    *,
    labels: Iterable[object] | None = None,
    partial: Iterable[int] = (),
) -> Iterator[Choice]:
    """One choice for every label, and for every number of blocks in which its dim may be seen.

    Args:
        op: The op.
        inputs: Labels of every tensor argument, in the order of ``op.tensors``. A label stands at
            most once in a tensor.
        outputs: Labels of every tensor result.
        labels: The labels that may be cut; default: all.
        partial: Positions of inputs that are added to the result once (a bias): they are ``P``
            where the result is.
    """
    sums = set(partial)
    wanted = dict.fromkeys(
        label for tensor in (*outputs, *inputs) for label in tensor if label is not None
    )
    allowed = wanted if labels is None else [x for x in dict.fromkeys(labels) if x in wanted]
    for label in allowed:
        contracted = not any(label in tensor for tensor in outputs)
        for g in _blocks(op, label, inputs, outputs):
            states = []
            for i, tensor in enumerate(inputs):
                if label in tensor:
                    states.append(S(list(tensor).index(label), g))
                else:
                    states.append(P if contracted and i in sums else whole(op.tensors[i]))
            results = [
                S(list(tensor).index(label), g) if label in tensor else P for tensor in outputs
            ]
            yield Choice(tuple(states), tuple(results))


def linear_choices(op: OpView, terms: Iterable[int]) -> Iterator[Choice]:
    """Partial sums in, partial sums out: the op is linear in these inputs together.

    The others are read whole; the gradient that they get is a partial sum.

    Args:
        op: The op.
        terms: Positions among ``op.tensors``.
    """
    chosen = set(terms)
    if not chosen or any(not _has_gradient(r) for r in op.results):
        return
    states = [P if i in chosen else whole(t) for i, t in enumerate(op.tensors)]
    if all(is_float(op.tensors[i]) for i in chosen):
        yield Choice(tuple(states), (P,) * len(op.results))


def aligned(op: OpView, shape: Sequence[int]) -> list[list[object]]:
    """Labels of inputs that broadcast to `shape`: the dims of `shape`, None where they broadcast.

    Raises:
        ValueError: An input has more dims than `shape`.
    """
    found: list[list[object]] = []
    for own in op.shapes:
        shift = len(shape) - len(own)
        if shift < 0:
            raise ValueError(f"{op.name}: {own} does not broadcast to {tuple(shape)}")
        found.append([None if n != shape[d + shift] else d + shift for d, n in enumerate(own)])
    return found


def dims(shape: Sequence[int], *, without: Iterable[int] = ()) -> list[object]:
    """The dims of a tensor as their own labels, but for some that may not be cut."""
    barred = {d % len(shape) for d in without} if shape else set()
    return [None if d in barred else d for d in range(len(shape))]


def _blocks(
    op: OpView, label: object, inputs: Sequence[Labels], outputs: Sequence[Labels]
) -> list[int]:
    """In how many blocks any tensor that has the label may see that dim."""
    found = {1}
    for tensor in outputs[:1]:
        if label in tensor:
            found.update(op.blocks(list(tensor).index(label)))
    for i, tensor in enumerate(inputs):
        if label in tensor:
            found.update(op.input_blocks(i, list(tensor).index(label)))
    return sorted(found)
