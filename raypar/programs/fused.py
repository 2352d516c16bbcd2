"""Fused backward ops taken apart, so that each half of a backward pass does its own share.

A convolution's backward makes the gradients of its input and of its weight in one call; run in both
halves of a split backward (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2), it would
do everything twice.
"""

from __future__ import annotations

import operator

from torch import fx

from raypar.graph.passes.emit import aten

_INPUT, _MASK = 0, -1


def split_fused_backward(graph: fx.Graph) -> int:
    """Gives every convolution's backward one call for its input and one for its parameters.

    Args:
        graph: A joint graph; changed in place.

    Returns:
        How many calls were taken apart.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        pieces = [u for u in node.users if u.target is operator.getitem]
        wanted = {u.args[1] for u in pieces}
        if len(pieces) < len(node.users) or _INPUT not in wanted or wanted == {_INPUT}:
            continue
        mask = list(node.args[_MASK])  # type: ignore[arg-type, call-overload]
        for part in ([True, False, False], [False, *mask[1:]]):
            with graph.inserting_before(node):
                call = graph.call_function(node.target, (*node.args[:_MASK], part))
            values = node.meta["val"]
            call.meta = {
                **node.meta,
                "val": tuple(v if on else None for v, on in zip(values, part, strict=True)),
            }
            for piece in pieces:
                if part[piece.args[1]]:  # type: ignore[index]
                    piece.update_arg(0, call)
        graph.erase_node(node)
        count += 1
    return count
