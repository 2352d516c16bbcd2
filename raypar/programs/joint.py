"""The joint trace: one stage's forward and its gradients as one flat graph of device ops."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from raypar.compat import forgetting_sizes, make_fx, pytree
from raypar.graph.passes.emit import aten, drop_unused
from raypar.graph.passes.functionalize import functionalize
from raypar.graph.replay import replay
from raypar.graph.turns import in_turn
from raypar.sharding.convert import NONE


@dataclass
class Joint:
    """A stage's forward and backward in one graph.

    Attributes:
        graph: Placeholders are the stage's own, then one tangent per differentiated output.
        inputs: The stage's placeholders, in the stage graph's order.
        tangents: One placeholder per entry of `differentiated`.
        differentiated: Positions of the outputs that carry gradients.
        outputs: Nodes of the forward outputs.
        gradients: One node (or None) per differentiated input.
        wrt: Positions of the differentiated inputs.
        constants: Tensors the trace lifted, by attribute name.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    tangents: list[fx.Node]
    differentiated: list[int]
    outputs: list[Any]
    gradients: list[fx.Node | None]
    wrt: list[int]
    constants: dict[str, torch.Tensor]


@in_turn
def trace_joint(graph: fx.Graph, wrt: Sequence[int], candidates: Sequence[int]) -> Joint:
    """Traces a stage with autograd on fake tensors.

    Args:
        graph: The stage's forward graph; placeholders carry fake values.
        wrt: Positions of the placeholders to differentiate.
        candidates: Positions of the outputs that may receive a gradient.
    """
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    mode = next(n.meta["val"].fake_mode for n in holders)
    differentiated: list[int] = []

    def outputs_of(values: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        leaves = [v.detach().requires_grad_(True) if i in wrt else v for i, v in enumerate(values)]
        with torch.enable_grad():
            return leaves, list(replay(graph, dict(zip(holders, leaves, strict=True))))

    def joint(values: list[torch.Tensor], tangents: list[torch.Tensor]) -> Any:
        leaves, outputs = outputs_of(values)
        gradients: Sequence[Any] = [None] * len(wrt)
        if differentiated and wrt:
            gradients = torch.autograd.grad(
                [outputs[i] for i in differentiated],
                [leaves[i] for i in wrt],
                tangents,
                allow_unused=True,
            )
        outputs = [o.detach() if isinstance(o, torch.Tensor) else o for o in outputs]
        return outputs, list(gradients)

    examples = [n.meta["val"] for n in holders]
    with mode:
        with forgetting_sizes(mode):
            _, shapes = outputs_of(examples)
        differentiated += [i for i in candidates if shapes[i].requires_grad]
        tangents = [
            torch.empty(shapes[i].shape, dtype=shapes[i].dtype, device=shapes[i].device)
            for i in differentiated
        ]
        module = make_fx(joint, tracing_mode="real")(examples, tangents)
        functionalize(module.graph, {}, {})
    return _read(module, len(holders), differentiated, list(wrt))


def _read(
    module: fx.GraphModule, n_inputs: int, differentiated: list[int], wrt: list[int]
) -> Joint:
    graph = module.graph
    for node in list(graph.nodes):
        if is_transparent(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    drop_unused(graph)
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    leaves = pytree.tree_leaves(output.args[0], is_leaf=lambda x: x is None)
    outputs, gradients = leaves[: len(leaves) - len(wrt)], leaves[len(leaves) - len(wrt) :]
    constants = {
        str(n.target): getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"
    }
    return Joint(
        graph,
        holders[:n_inputs],
        holders[n_inputs:],
        differentiated,
        outputs,
        gradients,
        wrt,
        constants,
    )


_SAME = frozenset((aten.detach.default, aten.alias.default, aten.lift_fresh.default))


def is_transparent(node: fx.Node) -> bool:
    """Whether a traced node stands for its first argument, and is left out of joint graphs."""
    return node.op == "call_function" and (node.target in _SAME or _moves_nothing(node))


def _moves_nothing(node: fx.Node) -> bool:
    """A conversion that is only there for its backward, which is part of the graph by now."""
    return node.target is torch.ops.raypar.convert.default and node.args[1] == NONE


def is_piece(node: fx.Node) -> bool:
    """Whether the node takes one output of a several-output op."""
    return node.target is operator.getitem
