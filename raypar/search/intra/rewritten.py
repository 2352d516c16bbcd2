"""What a rank runs where an op is written anew for its part: many calls in place of one.

Vocabulary-parallel cross-entropy, a softmax over a cut dim or a row-parallel embedding read their
parts several times, and talk in between. What the captured op would cost says little about that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import fx

from raypar.graph.costs import size_of
from raypar.graph.passes.emit import op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.quick import OpWork, op_work, seconds_of
from raypar.search.cost.work import node_work
from raypar.sharding.local_call import local_graph
from raypar.sharding.rules.base import OpView, Strategy, find_localiser, is_tensor


class Leg(NamedTuple):
    """A conversion among the calls.

    Attributes:
        axis: The mesh axis.
        there: What is done going forward.
        back: What is done with the gradient.
        before: Bytes of one rank's part before.
        after: And after.
        flows: Whether its result gets a gradient.
    """

    axis: str
    there: str
    back: str
    before: int
    after: int
    flows: bool


class Done(NamedTuple):
    """A call that computes.

    Attributes:
        work: What it does.
        product: Whether it is a matrix product.
        flows: Whether its result gets a gradient.
    """

    work: OpWork
    product: bool
    flows: bool


Calls = tuple[Leg | Done, ...]
"""What stands in place of one op on a rank, in order."""

_known: WeakKeyDictionary[fx.Graph, dict[object, Calls | None]] = WeakKeyDictionary()
"""Graph → calls of its ops: the same for all kinds of devices, links and policies."""


def local_calls(
    node: fx.Node,
    strategy: Strategy,
    axes: Sequence[tuple[str, int]],
    wants_gradient: Sequence[bool],
) -> Calls | None:
    """The calls that a rank makes for an op.

    Args:
        node: The op, at the size of one microbatch on one replica.
        strategy: How it runs.
        axes: (name, size) of every mesh axis.
        wants_gradient: For every tensor argument, in call order.

    Returns:
        None where it is a single call of the same op on smaller tensors, and where the op has
        several results or no tensor to read, or sizes that are known only when it runs.
    """
    if strategy.whole or find_localiser(op_name(node)) is None or not node.all_input_nodes:
        return None
    if not all(is_tensor(a.meta.get("val")) and _sized(a) for a in (node, *node.all_input_nodes)):
        return None
    known = _known.setdefault(node.graph, {})
    # By its name: a node would keep its graph alive, and with it this entry.
    key = node.name, strategy, tuple(axes), tuple(wants_gradient)
    if key not in known:
        known[key] = _written(node, strategy, axes, wants_gradient)
    return known[key]


def _written(
    node: fx.Node,
    strategy: Strategy,
    axes: Sequence[tuple[str, int]],
    wants_gradient: Sequence[bool],
) -> Calls | None:
    graph = local_graph(OpView(node), strategy, axes)
    holders = graph.find_nodes(op="placeholder")
    flowing = {holder for holder, wants in zip(holders, wants_gradient, strict=True) if wants}
    nodes = tuple(n for n in graph.nodes if n.op == "call_function")
    if len(nodes) == 1 and nodes[0].target is node.target:
        return None
    for call in nodes:
        if op_name(call) != "detach" and flowing.intersection(call.all_input_nodes):
            flowing.add(call)
    return tuple(_leg(n, flowing) if op_name(n) == "convert" else _done(n, flowing) for n in nodes)


def _leg(node: fx.Node, flowing: set[fx.Node]) -> Leg:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    before, after = size_of(source.meta["val"]), size_of(node.meta["val"])
    axis, there, back = str(node.args[5]), str(node.args[1]), str(node.args[2])
    return Leg(axis, there, back, before, after, node in flowing)


def _done(node: fx.Node, flowing: set[fx.Node]) -> Done:
    return Done(op_work(node, flowing), node_work(node).matmul, node in flowing)


def price_of(
    calls: Calls, machine: MeshMachine, recompute: str, leg_s: Callable[[str, str, int, int], float]
) -> tuple[float, float, float]:
    """Adds up what calls cost, as `raypar.search.intra.prices.OpPrice` has it.

    Args:
        calls: From `local_calls`.
        machine: The mesh.
        recompute: The policy: ``none``, ``selective`` or ``full``.
        leg_s: Seconds of one direction of a conversion: axis, what is done, and the bytes of one
            rank's part before and after it.

    Returns:
        Seconds forward; seconds backward, recomputation included; bytes of results that are held
        for backward, those of products left out: who reads a product holds it.
    """
    forward = backward = again = saved = 0.0
    for call in calls:
        if isinstance(call, Leg):
            seconds = leg_s(call.axis, call.there, call.before, call.after)
            forward += seconds
            again += seconds if recompute == "full" else 0.0
            if call.flows:
                backward += leg_s(call.axis, call.back, call.after, call.before)
            continue
        own = seconds_of(call.work, machine)
        forward += own.forward
        if recompute == "full" or (recompute == "selective" and not call.product):
            again += own.forward
        if call.flows:
            backward += own.backward_input + own.backward_weight
            saved += 0.0 if call.product else call.work.saved_bytes
    return forward, backward + again, saved if recompute == "none" else 0.0


def _sized(node: fx.Node) -> bool:
    return all(type(n) is int for n in node.meta["val"].shape)
