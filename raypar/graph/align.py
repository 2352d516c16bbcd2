"""Brings the graph of another batch size into step with the reference graph.

Model code often skips an `expand` to the batch size where the size is already right, which it is
for a batch of one. Such an expand changes nothing there, so it is put back.
"""

from __future__ import annotations

from torch import fx

from raypar.graph.build import CleanGraph, assign_ids
from raypar.graph.passes.emit import Emitter, aten, op_name


def restore_expands(reference: CleanGraph, other: CleanGraph) -> None:
    """Inserts into `other` the expands that only `reference` has; leaves it alone if unsure."""
    found = _missing(reference, other)
    if not found:
        return
    for original, anchor, source, users in found:
        emit = Emitter(other.graph, anchor)
        shape = list(source.meta["val"].shape)
        new = emit(aten.expand.default, source, shape)
        new.meta.update({k: original.meta[k] for k in ("module_path", "source")})
        for user in users:
            user.replace_input_with(source, new)
    assign_ids(other.graph)


def _missing(
    reference: CleanGraph, other: CleanGraph
) -> list[tuple[fx.Node, fx.Node, fx.Node, list[fx.Node]]]:
    """(the original, where, what to expand, who reads it) of every expand that `other` lacks."""
    theirs = other.ops
    mapping: dict[fx.Node, fx.Node] = {}
    skipped: dict[fx.Node, tuple[fx.Node, fx.Node, list[fx.Node]]] = {}
    at = 0
    for node in reference.ops:
        candidate = theirs[at] if at < len(theirs) else None
        if candidate is not None and _alike(node, candidate, mapping):
            mapping[node] = candidate
            at += 1
            for i in node.all_input_nodes:
                if i in skipped:
                    skipped[i][2].append(candidate)
            continue
        source = node.args[0] if node.args else None
        if candidate is None or op_name(node) not in ("expand", "expand_as", "broadcast_to"):
            return []
        if not isinstance(source, fx.Node) or source in skipped:
            return []
        target = mapping.get(source)
        if target is None:
            return []
        skipped[node] = (candidate, target, [])
        mapping[node] = target
    return [(n, *rest) for n, rest in skipped.items()] if at == len(theirs) else []


def _alike(mine: fx.Node, theirs: fx.Node, mapping: dict[fx.Node, fx.Node]) -> bool:
    same_op = op_name(mine) == op_name(theirs)
    same_place = mine.meta.get("module_path") == theirs.meta.get("module_path")
    inputs = [mapping[i] for i in mine.all_input_nodes if i in mapping]
    others = set(theirs.all_input_nodes)
    return same_op and same_place and all(i in others for i in inputs)
