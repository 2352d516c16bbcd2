"""Partitions a joint graph into forward, backward, and the two halves of backward.

* forward: inputs → outputs, saved values
* backward: kept inputs, saved values, tangents → all gradients
* backward_input: the same → gradients of received values, and what the other half needs of it
* backward_weight: kept inputs, saved values, tangents, intermediates → gradients of parameters
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from raypar.compat import storage_id
from raypar.graph.costs import size_of
from raypar.programs.fused import split_fused_backward
from raypar.programs.joint import Joint, is_piece
from raypar.programs.policy import Predicate


@dataclass
class Piece:
    """A part of a joint graph: nodes in execution order, between inputs and outputs.

    Attributes:
        inputs: Nodes it is given.
        nodes: Nodes it computes, in order.
        outputs: Nodes it returns; None where there is nothing to return.
    """

    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node | None]


@dataclass
class Parts:
    """The programs of a stage as pieces of its joint graph.

    Attributes:
        forward: Outputs are the stage's, then `saved`.
        backward: Outputs are the gradients of received values, then of parameters.
        backward_input: Outputs are the gradients of received values, then `between`.
        backward_weight: Outputs are the gradients of parameters.
        kept: Stage inputs that backward reads again.
        saved: Forward values that backward reads.
        between: Values the input half hands to the weight half.
        weight_inputs: Which of kept, saved and tangents the weight half reads.
    """

    forward: Piece
    backward: Piece
    backward_input: Piece
    backward_weight: Piece
    kept: list[fx.Node]
    saved: list[fx.Node]
    between: list[fx.Node]
    weight_inputs: list[fx.Node]


def partition(joint: Joint, recompute: Predicate, received: Collection[int]) -> Parts:
    """Divides a joint graph.

    Args:
        joint: The traced stage; where there are two halves, fused backward ops of its graph are
            taken apart.
        recompute: True for forward values to compute again in backward.
        received: Positions of inputs that come from other stages: their gradients are the input
            half's.
    """
    if received:
        split_fused_backward(joint.graph)
    order = {node: i for i, node in enumerate(joint.graph.nodes)}
    forward_outputs = [o for o in joint.outputs if isinstance(o, fx.Node)]
    forward_set = _ancestors(forward_outputs) | set(joint.inputs)
    # Pieces that only backward reads (a norm's statistics) are forward values all the same.
    forward_set |= {n for n in joint.graph.nodes if is_piece(n) and n.args[0] in forward_set}
    input_grads = [g for p, g in zip(joint.wrt, joint.gradients, strict=True) if p in received]
    weight_grads = [g for p, g in zip(joint.wrt, joint.gradients, strict=True) if p not in received]
    targets = [g for g in joint.gradients if g is not None]
    needed = _needed(targets, forward_set, set(joint.tangents), recompute)
    kept = [n for n in joint.inputs if n in needed]
    saved = sorted((n for n in needed if n.op != "placeholder"), key=order.__getitem__)
    forward = Piece(
        joint.inputs,
        _between(joint, forward_outputs + saved, set(joint.inputs)),
        [*joint.outputs, *saved],
    )
    given = [*kept, *saved, *joint.tangents]
    backward = _piece(joint, given, [*input_grads, *weight_grads])
    first = _piece(joint, given, input_grads)
    done = set(first.nodes)
    second_nodes, border = _rest(weight_grads, done, set(given))
    between = sorted((n for n in border if n in done), key=order.__getitem__)
    weight_inputs = [n for n in given if n in border]
    first = Piece(given, first.nodes, [*input_grads, *between])
    second = Piece(
        [*weight_inputs, *between],
        _lazy_order(joint, second_nodes, [g for g in weight_grads if g is not None]),
        list(weight_grads),
    )
    return Parts(forward, backward, first, second, kept, saved, between, weight_inputs)


def _ancestors(roots: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """`roots` and what they are made of, up to and without `stop`."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _needed(
    targets: Sequence[fx.Node],
    forward: set[fx.Node],
    tangents: set[fx.Node],
    recompute: Predicate,
) -> set[fx.Node]:
    """Forward values (and inputs) that backward must be given."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in seen or node in tangents:
            continue
        seen.add(node)
        keep = node in forward and (node.op == "placeholder" or not recompute(node))
        if keep and not isinstance(node.meta.get("val"), (list, tuple)):
            found.add(node)
        else:
            stack.extend(node.all_input_nodes)
    return found


def _between(joint: Joint, roots: Sequence[fx.Node], given: set[fx.Node]) -> list[fx.Node]:
    """What computes `roots` from `given`, in graph order."""
    wanted = _ancestors(roots, given)
    return [n for n in joint.graph.nodes if n in wanted]


def _piece(joint: Joint, given: list[fx.Node], outputs: Sequence[fx.Node | None]) -> Piece:
    roots = [o for o in outputs if o is not None]
    nodes = set(_between(joint, roots, set(given)))
    return Piece(given, _lazy_order(joint, nodes, roots), list(outputs))


def _lazy_order(
    joint: Joint, nodes: Collection[fx.Node], roots: Sequence[fx.Node]
) -> list[fx.Node]:
    """Graph order, but recomputed forward values as late as their first use.

    Forward values come first in the joint graph; run in that order, backward would hold all that
    it recomputes at once.
    """
    inside = set(nodes)
    tangent_side = _descendants(joint.tangents)
    ordered: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(root: fx.Node) -> None:
        stack = [(root, iter(root.all_input_nodes))]
        while stack:
            node, pending = stack[-1]
            for i in pending:
                if i in inside and i not in placed:
                    stack.append((i, iter(i.all_input_nodes)))
                    break
            else:
                stack.pop()
                if node not in placed:
                    placed.add(node)
                    ordered.append(node)

    for node in joint.graph.nodes:
        if node in inside and node in tangent_side:
            place(node)
    for root in roots:
        if root in inside:
            place(root)
    return ordered


def _descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def _rest(
    targets: Sequence[fx.Node | None], done: set[fx.Node], given: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """(nodes the weight half computes, nodes it is handed)."""
    own: set[fx.Node] = set()
    border: set[fx.Node] = set()
    stack = [t for t in targets if t is not None]
    while stack:
        node = stack.pop()
        if node in own or node in border:
            continue
        if node in given or (node in done and not isinstance(node.meta.get("val"), (list, tuple))):
            border.add(node)
            continue
        own.add(node)
        stack.extend(node.all_input_nodes)
    return own, border


def saved_bytes(nodes: Iterable[fx.Node], free: Iterable[fx.Node] = ()) -> int:
    """Bytes of distinct storages behind `nodes` (fake values), without those behind `free`."""
    sizes: dict[int, int] = {}
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            size = storage.nbytes()
            sizes[storage_id(value)] = size if isinstance(size, int) else size_of(value)
    for node in free:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes.pop(storage_id(value), None)
    return sum(sizes.values())
