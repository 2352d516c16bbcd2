"""All strategies of an op on a mesh: the product of its choices on every axis."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import fx

from raypar.errors import PlanError
from raypar.sharding.rules.base import (
    Choice,
    OpView,
    Strategy,
    argument_leaves,
    find_combination,
    find_rule,
)
from raypar.sharding.spec import RG, R, ShardingSpec


def choices(op: OpView, size: int) -> list[Choice]:
    """What an op may do on one axis; the first choice is ``R`` everywhere.

    A choice whose cut dims do not divide by `size` is left out, and so is one that reads and makes
    nothing but whole values: it would compute everything everywhere, in more words. (Whole values
    alone may make a part: of random numbers, of one-hot codes.)
    """
    whole = Choice((R,) * len(op.shapes), (R,) * len(op.results))
    found = [whole]
    if size == 1:
        return found
    rule = find_rule(op.name)
    if rule is None:
        return found
    for choice in rule(op, size):
        states = zip((*choice.inputs, *choice.outputs), (*op.shapes, *_results(op)), strict=True)
        if {*choice.inputs, *choice.outputs} <= {R, RG}:
            continue
        if all(ShardingSpec((s,)).fits(shape, (size,)) for s, shape in states):
            found.append(choice)
    return list(dict.fromkeys(found))


def strategies(node: fx.Node, mesh: Sequence[int]) -> list[Strategy]:
    """Every strategy of an op on a mesh; the first is whole on every axis.

    Args:
        node: The call (not a ``getitem``: pieces lie as the op that made them).
        mesh: Size of every mesh axis.
    """
    key = call_key(node)
    if key is None:
        return _enumerate(OpView(node), tuple(mesh))
    known = _CACHE.get((key, tuple(mesh)))
    if known is None:
        known = _CACHE[key, tuple(mesh)] = _enumerate(OpView(node), tuple(mesh))
        if len(_CACHE) > _MOST:
            _CACHE.pop(next(iter(_CACHE)))
    return known


_CACHE: dict[object, list[Strategy]] = {}
_MOST = 4096


def _enumerate(op: OpView, mesh: tuple[int, ...]) -> list[Strategy]:
    per_axis = [choices(op, size) for size in mesh]
    results = _results(op)
    allowed = find_combination(op.name)
    found: dict[Strategy, None] = {}
    seen: set[tuple[object, object]] = set()
    for combination in itertools.product(*per_axis):
        inputs = tuple(
            ShardingSpec(c.inputs[i] for c in combination) for i in range(len(op.shapes))
        )
        outputs = tuple(
            ShardingSpec(c.outputs[i] for c in combination) for i in range(len(results))
        )
        values = zip((*inputs, *outputs), (*op.shapes, *results), strict=True)
        if (inputs, outputs) in seen or not all(s.fits(shape, mesh) for s, shape in values):
            continue
        strategy = Strategy(inputs, outputs, tuple(c.tag for c in combination))
        if allowed is not None and not allowed(op, strategy, mesh):
            continue
        seen.add((inputs, outputs))
        found[strategy] = None
    return list(found)


def find_strategy(node: fx.Node, mesh: Sequence[int], text: str) -> Strategy:
    """The strategy that prints as `text`.

    Raises:
        PlanError: The op has no such strategy on this mesh.
    """
    known = strategies(node, mesh)
    for strategy in known:
        if str(strategy) == text:
            return strategy
    some = "; ".join(str(s) for s in known[:6])
    raise PlanError(
        f"op {node.meta.get('id')!r} cannot run as {text!r} on a mesh of {list(mesh)}; it has "
        f"{len(known)} strategies: {some}{' ...' if len(known) > 6 else ''}"
    )


def whole(node: fx.Node, n_axes: int) -> Strategy:
    """The strategy that computes everything on every rank."""
    op = OpView(node)
    all_r = ShardingSpec.replicated(n_axes)
    return Strategy((all_r,) * len(op.shapes), (all_r,) * len(op.results), ("",) * n_axes)


def is_piece(node: fx.Node) -> bool:
    """Whether the node takes one result of a several-result op."""
    return node.target is operator.getitem


def _results(op: OpView) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(r.shape) for r in op.results)


def call_key(node: fx.Node) -> object:
    """What the choices of an op depend on; None where it cannot be told."""
    parts: list[object] = [node.target]
    for leaf in argument_leaves(node):
        if isinstance(leaf, fx.Node):
            value = leaf.meta.get("val")
            shape = tuple(getattr(value, "shape", ()))
            dtype = str(getattr(value, "dtype", type(value)))
            # A rule may look at a constant that the graph makes (offsets in equal steps).
            made = leaf.op == "call_function" and not leaf.all_input_nodes
            constant = f"{leaf.target}{leaf.args}" if made else ""
            parts.append((shape, dtype, leaf.op == "placeholder", constant, _blocks(leaf)))
        else:
            parts.append(str(leaf))
    parts.append(tuple(node.kwargs))
    parts.append(tuple(tuple(r.shape) for r in OpView(node).results))
    parts.append(_blocks(node))
    try:
        hash(tuple(parts))
    except TypeError:
        return None
    return tuple(parts)


def _blocks(node: fx.Node) -> tuple[object, ...]:
    return tuple(sorted((d, tuple(sorted(g))) for d, g in node.meta.get("blocks", {}).items()))


@lru_cache(maxsize=4096)
def pattern_of(op_id: str) -> str:
    """An op's id with the numbers in its path replaced by ``*``: equal for repeated layers."""
    path, sep, rest = op_id.partition("/")
    parts = ["*" if p.isdigit() else p for p in path.split(".")]
    return ".".join(parts) + sep + rest


def fold_patterns(exact: Mapping[str, str], ids: Sequence[str]) -> dict[str, str]:
    """Entries that all ops of a pattern share become one entry of the pattern.

    Args:
        exact: Op id → strategy text, of these ops and of others.
        ids: All op ids of one stage.
    """
    result: dict[str, str] = {}
    for pattern, group in itertools.groupby(sorted(ids, key=pattern_of), key=pattern_of):
        members = list(group)
        texts = {exact.get(key) for key in members}
        if len(members) > 1 and len(texts) == 1:
            text = texts.pop()
            if text is not None:
                result[pattern] = text
            continue
        result.update({key: exact[key] for key in members if key in exact})
    return result
