"""Which dims are blocks side by side: a fused q, k, v projection that is taken apart again.

A dim that a reader sees as g equal blocks (``chunk``, ``split``, a view that unfolds it) may be cut
in each of the blocks, ``S<d>/<g>``; and so may the value that the reader's input was computed from,
back to the projection whose output features are cut. The other way round, a view that folds
``(batch, sequence)`` leaves a dim of as many blocks as there are samples, for its readers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from raypar.graph.passes.emit import is_op
from raypar.sharding.rules.base import OpView, find_rule
from raypar.sharding.spec import State, cut_of, is_shard

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
    for node in nodes:
        _forward(node)
    for node in reversed(nodes):
        _backward(node)


def _forward(node: fx.Node) -> None:
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node):
        for dim, counts in source.meta.get("blocks", {}).items():
            _note(node, dim, counts)
        return
    for _, outputs in _choices(node):
        _note_state(node, outputs[0])


def _backward(node: fx.Node) -> None:
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node):
        for dim, counts in node.meta.get("blocks", {}).items():
            _note(source, dim, counts)
        return
    tensors = OpView(node).tensors if is_op(node) else ()
    for inputs, _ in _choices(node):
        for tensor, state in zip(tensors, inputs, strict=True):
            _note_state(tensor, state)


def _choices(node: fx.Node) -> Iterable[tuple[tuple[State, ...], tuple[State, ...]]]:
    if not is_op(node):
        return []
    op = OpView(node)
    rule = find_rule(op.name)
    if rule is None or not op.results:
        return []
    return [(choice.inputs, choice.outputs) for choice in rule(op, _SIZE)]


def _note_state(node: fx.Node, state: State) -> None:
    if not is_shard(state):
        return
    dim, count = cut_of(state)
    shape = node.meta["val"].shape if hasattr(node.meta["val"], "shape") else None
    if count > 1 and (shape is None or shape[dim] % (count * _SIZE) == 0):
        _note(node, dim, {count})


def _note(node: fx.Node, dim: int, counts: Iterable[int]) -> None:
    node.meta.setdefault("blocks", {}).setdefault(dim, set()).update(counts)
