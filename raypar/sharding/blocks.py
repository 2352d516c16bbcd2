"""Which dims are blocks side by side: a fused q, k, v projection that is taken apart again.

A dim that a reader sees as g equal blocks (``chunk``, ``split``, a view that unfolds it) may be cut
in each of the blocks, ``S<d>/<g>``; and so may the value that the reader's input was computed from,
back to the projection whose output features are cut. The other way round, a view that folds
``(batch, sequence)`` leaves a dim of as many blocks as there are samples, for its readers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import fx

from raypar.graph.passes.emit import is_op
from raypar.sharding.rules.base import OpView, find_rule
from raypar.sharding.spec import State, cut_of, is_shard
from raypar.sharding.strategies import call_key


class _Cuts(NamedTuple):
    """(dim, blocks) of every cut in blocks, for every tensor argument and for the result."""

    inputs: tuple[tuple[tuple[int, int], ...], ...]
    result: tuple[tuple[int, int], ...]


_Known = dict[object, _Cuts]

_SIZE = 2
"""Rules are asked about the smallest axis; which sizes divide is checked per strategy."""


def annotate_blocks(graph: fx.Graph) -> None:
    """Writes ``node.meta["blocks"]``: dim → numbers of equal blocks in which it may be cut.

    Rules are asked in both directions: what a value may come in, from the first op to the last;
    what its readers want, from the last to the first. Rules read what is written here
    (`OpView.blocks`, `OpView.input_blocks`), so that it travels through every op that keeps it.
    """
    nodes = list(graph.nodes)
    for node in nodes:
        node.meta.pop("blocks", None)
    known: _Known = {}
    for node in nodes:
        _forward(node, known)
    for node in reversed(nodes):
        _backward(node, known)


def _forward(node: fx.Node, known: _Known) -> None:
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node):
        for dim, counts in source.meta.get("blocks", {}).items():
            _note(node, dim, counts)
        return
    _note_all(node, _cuts(node, known).result)


def _backward(node: fx.Node, known: _Known) -> None:
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node):
        for dim, counts in node.meta.get("blocks", {}).items():
            _note(source, dim, counts)
        return
    found = _cuts(node, known)
    if any(found.inputs):
        for tensor, cuts in zip(OpView(node).tensors, found.inputs, strict=True):
            _note_all(tensor, cuts)


def _cuts(node: fx.Node, known: _Known) -> _Cuts:
    """Which cuts in blocks the rule of an op offers; equal calls are asked once."""
    if not is_op(node):
        return _Cuts((), ())
    key = call_key(node)
    if key is None or key not in known:
        found = _ask(node)
        if key is None:
            return found
        known[key] = found
    return known[key]


def _ask(node: fx.Node) -> _Cuts:
    op = OpView(node)
    rule = find_rule(op.name)
    if rule is None or not op.results:
        return _Cuts((), ())
    choices = list(rule(op, _SIZE))
    return _Cuts(
        tuple(
            _in_blocks((c.inputs[i] for c in choices), shape) for i, shape in enumerate(op.shapes)
        ),
        _in_blocks((c.outputs[0] for c in choices), op.out),
    )


def _in_blocks(states: Iterable[State], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    cuts = {cut_of(s) for s in states if is_shard(s)}
    return tuple((d, g) for d, g in sorted(cuts) if g > 1 and shape[d] % (g * _SIZE) == 0)


def _note_all(node: fx.Node, cuts: Iterable[tuple[int, int]]) -> None:
    for dim, count in cuts:
        _note(node, dim, {count})


def _note(node: fx.Node, dim: int, counts: Iterable[int]) -> None:
    node.meta.setdefault("blocks", {}).setdefault(dim, set()).update(counts)
