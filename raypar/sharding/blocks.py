"""Which dims are blocks side by side: a fused q, k, v projection that is taken apart again."""

from __future__ import annotations

from torch import fx

from raypar.graph.passes.emit import bound_args, is_op, op_name


def annotate_blocks(graph: fx.Graph) -> None:
    """Writes ``node.meta["blocks"]``: dim → numbers of equal blocks in which readers see it."""
    for node in graph.nodes:
        if not is_op(node) or op_name(node) != "chunk":
            continue
        bound = bound_args(node)
        source = bound["self"]
        if not isinstance(source, fx.Node):
            continue
        rank = source.meta["val"].dim()
        dim, count = bound["dim"] % rank, bound["chunks"]
        if source.meta["val"].shape[dim] % count == 0:
            source.meta.setdefault("blocks", {}).setdefault(dim, set()).add(count)
