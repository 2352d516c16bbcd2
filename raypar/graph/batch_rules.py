"""Batch rules: for each op, how the states of its inputs make the state of its output.

A rule is a function from a `Call` to a state; it raises `Mixing` with the reason where samples
meet. Rules are registered by schema name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from raypar.graph.states import Batch, Const, Mixed, Ramp, Reduced, State, States, scaled

if TYPE_CHECKING:
    from raypar.graph.batch import Call


class Mixing(Exception):
    """Samples meet, or the op has no rule; the text is the reason."""


Rule = Callable[["Call"], States]
_RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Declares the batch rule of the ops with these schema names."""

    def add(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = rule
        return rule

    return add


def rule_for(name: str) -> Rule:
    """The rule of an op.

    Raises:
        Mixing: None is declared.
    """
    if not _RULES:
        from raypar.graph import (  # noqa: F401
            batch_rules_layers,
            batch_rules_math,
            batch_rules_views,
        )
    rule = _RULES.get(name)
    if rule is None:
        raise Mixing(f"{name} has no declared batch rule")
    return rule


def only_batch(call: Call, value: Any) -> Batch | None:
    """The Batch state of a tensor argument, or None where it is Const (power 0).

    Raises:
        Mixing: It is neither.
    """
    state = call.state(value)
    if isinstance(state, Batch) and state.power == 0:
        return state
    if state == Const():
        return None
    raise Mixing(describe(call, state))


def describe(call: Call, state: State) -> str:
    """Why `state` is no good as an input here."""
    if isinstance(state, Reduced):
        return f"{call.name} is applied to a value that is reduced over the batch"
    if isinstance(state, Ramp):
        return f"{call.name} depends on a sample's position in the batch"
    if isinstance(state, (Batch, Const)) and state.power:
        return f"{call.name} is applied to a value that was scaled by the batch size"
    return f"{call.name} does not keep samples apart"


def aligned(call: Call, values: Iterable[fx.Node], ndim: int) -> Batch | None:
    """The common state of values that broadcast against each other to `ndim` dims.

    Raises:
        Mixing: Their batch dims differ, or one is neither Batch nor Const.
    """
    found: Batch | None = None
    for value in values:
        state = only_batch(call, value)
        if state is None:
            continue
        moved = Batch(state.dim + ndim - len(call.shape(value)), state.outer)
        if found is not None and found != moved:
            raise Mixing(f"{call.name} meets samples along different dims")
        found = moved
    return found


def or_const(state: Batch | None) -> State:
    """`state`, or Const for None."""
    return Const() if state is None else state


def every_output(call: Call, state: State) -> States:
    """The same state for each of several outputs; one state for a single output."""
    if isinstance(call.out, (list, tuple)):
        return tuple(state for _ in call.out)
    return state


def dim_list(dims: Any, ndim: int) -> list[int]:
    """Normalised dims; None or empty means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    items = dims if isinstance(dims, (list, tuple)) else [dims]
    return [int(d) % max(ndim, 1) for d in items]


def reduced_over(state: Batch, dims: list[int], keepdim: bool) -> Batch | None:
    """The state after dims are reduced away; None where the batch dim is one of them."""
    if state.dim in dims:
        return None
    if keepdim:
        return state
    return Batch(state.dim - sum(d < state.dim for d in dims), state.outer, state.power)


def flat_outer(shape: tuple[int, ...], state: Batch) -> int:
    """How many repetitions of the whole batch lie in front of the sample index, row-major."""
    return math.prod(shape[: state.dim]) * state.outer


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


__all__ = [
    "Batch",
    "Const",
    "Mixed",
    "Mixing",
    "Ramp",
    "Reduced",
    "State",
    "States",
    "aligned",
    "describe",
    "dim_list",
    "every_output",
    "flat_outer",
    "is_tensor",
    "only_batch",
    "or_const",
    "reduced_over",
    "register",
    "rule_for",
    "scaled",
]
