"""Regions: no_grad becomes detach, autocast becomes a note on each op, assertions go."""

from __future__ import annotations

import torch
from torch import fx

from raypar.compat import is_autocast_enter, is_autocast_exit, is_grad_mode_switch
from raypar.graph.passes.emit import aten, is_op, op_name


def drop_regions(graph: fx.Graph) -> None:
    """Replaces region markers by what they mean for each op inside.

    Ops under ``no_grad`` get a detach on their result; ops under autocast carry
    ``meta["autocast"] = (device type, dtype, enabled)``, which the stage programs honour.
    """
    grad = True
    autocasts: list[tuple[fx.Node, tuple[str, torch.dtype | None, bool]]] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_grad_mode_switch(node.target):
            grad = bool(node.args[0])
            graph.erase_node(node)
        elif is_autocast_enter(node.target):
            device, dtype, enabled = node.args[0], node.args[1], node.args[2]
            autocasts.append((node, (str(device), dtype, bool(enabled))))  # type: ignore[arg-type]
        elif is_autocast_exit(node.target):
            opened = node.args[0]
            graph.erase_node(node)
            autocasts = [(n, region) for n, region in autocasts if n is not opened]
            if isinstance(opened, fx.Node) and not opened.users:
                graph.erase_node(opened)
        elif is_op(node) and op_name(node).startswith("_assert"):
            graph.erase_node(node)
        else:
            if autocasts and autocasts[-1][1][2]:
                node.meta["autocast"] = autocasts[-1][1]
            if not grad:
                _detach(graph, node)


def _detach(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or not (value.is_floating_point() or value.is_complex())
        or node.target is aten.detach.default
    ):
        return
    with graph.inserting_after(node):
        detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
