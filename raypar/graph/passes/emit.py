"""Small tools that every clean-up pass uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from raypar.compat import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    argument_defaults,
    pytree,
    schema_name,
)

aten = torch.ops.aten


def value_of(node: Any) -> Any:
    """A node's fake value; anything else as it is."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; a function's own name for Python functions."""
    if isinstance(node.target, OpOverload):
        return schema_name(node.target).split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def is_op(node: fx.Node) -> bool:
    """Whether the node calls a torch operator."""
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def bound_args(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by schema name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    names = argument_defaults(node.target)
    bound = dict(names)
    bound.update({name: value for (name, _), value in zip(names, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def pick(bound: dict[str, Any], *names: str) -> Any:
    """The first of `names` among bound arguments: overloads name their arguments differently."""
    return next((bound[name] for name in names if name in bound), None)


def drop_unused(graph: fx.Graph) -> None:
    """Erases the calls that nothing reads."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def fake_call(target: Any, args: Any, kwargs: Any, graph: fx.Graph | None = None) -> Any:
    """Runs `target` on the fake values of its node arguments; gives a fake result.

    Where no argument is fake (a constant that the graph makes), `graph` tells what fake is.
    """
    values = pytree.tree_map(value_of, (args, kwargs))
    mode = _mode_of(pytree.tree_leaves(values))
    if mode is None and graph is not None:
        mode = _mode_of(node.meta.get("val") for node in graph.nodes)
    if mode is None:
        return target(*values[0], **values[1])
    with mode, torch.no_grad():
        return target(*values[0], **values[1])


def _mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def autocast_of(node: fx.Node) -> contextlib.AbstractContextManager[Any]:
    """The autocast region that the op was captured in."""
    region = node.meta.get("autocast")
    if region is None:
        return contextlib.nullcontext()
    device, dtype, enabled = region
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


class Emitter:
    """Writes new nodes in front of `anchor`, with fake values and the anchor's origin."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self.graph = graph
        self.anchor = anchor

    def __call__(self, target: Any, *args: Any, like: Any = None, **kwargs: Any) -> fx.Node:
        """Adds one call; `like` gives the fake value where running the call would not."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("module_path", "source", "autocast"):
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        with autocast_of(node):
            node.meta["val"] = fake_call(target, args, kwargs, self.graph) if like is None else like
        return node
