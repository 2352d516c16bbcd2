"""Runs a clean graph op by op, as autograd sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from raypar.errors import CaptureError
from raypar.graph.build import CleanGraph
from raypar.graph.passes.emit import autocast_of


def replay(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    visit: Callable[[fx.Node, Any], None] | None = None,
) -> Any:
    """Computes the graph's outputs.

    Args:
        graph: Placeholders, calls, one output.
        values: Value of every placeholder.
        visit: Called with every op and its result.
    """
    env: dict[fx.Node, Any] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for i in node.all_input_nodes:
            last[i] = node
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node]
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda n: env[n])
        else:
            args = fx.map_arg(node.args, lambda n: env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
            with autocast_of(node):
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if visit is not None:
                visit(node, env[node])
        for i in node.all_input_nodes:
            if last[i] is node:
                env.pop(i, None)
    raise AssertionError("a graph has an output")


def gradient_flow(clean: CleanGraph, trainable: Mapping[str, bool]) -> frozenset[str]:
    """Ids of the values (ops and ``param:NAME``) that receive a gradient from the loss.

    Found by running autograd itself on fake tensors, so it knows what every op's backward does.

    Raises:
        CaptureError: No trainable parameter reaches the loss.
    """
    kept: list[tuple[str, torch.Tensor]] = []

    def visit(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            kept.append((node.meta["id"], value))

    mode = clean.rng.meta["val"].fake_mode
    values: dict[fx.Node, Any] = {
        n: n.meta["val"].detach() for n in clean.graph.nodes if n.op == "placeholder"
    }
    with mode, torch.enable_grad():
        for name, node in clean.params.items():
            if trainable[name]:
                values[node].requires_grad_(True)
                kept.append((f"param:{name}", values[node]))
        loss = replay(clean.graph, values, visit)[0]
        if not loss.requires_grad:
            raise CaptureError(
                "no trainable parameter reaches the loss: every path is frozen, detached or under "
                "no_grad; unfreeze a parameter (requires_grad=True)"
            )
        gradients = torch.autograd.grad(loss, [t for _, t in kept], allow_unused=True)
    return frozenset(key for (key, _), g in zip(kept, gradients, strict=True) if g is not None)
