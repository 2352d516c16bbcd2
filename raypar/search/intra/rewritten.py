"""What a rank runs where an op is written anew for its part: many calls in place of one.

Vocabulary-parallel cross-entropy, a softmax over a cut dim or a row-parallel embedding read their
parts several times, and talk in between. What the captured op would cost says little about that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import fx

from raypar.graph.costs import size_of
from raypar.graph.passes.emit import op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.quick import op_work, seconds_of
from raypar.search.cost.work import node_work
from raypar.sharding.local_call import local_graph
from raypar.sharding.rules.base import OpView, Strategy, find_localiser, is_tensor


class Calls(NamedTuple):
    """What stands in place of one op on a rank.

    Attributes:
        nodes: The calls in order, of local shape.
        flowing: Those whose results get a gradient.
    """

    nodes: tuple[fx.Node, ...]
    flowing: frozenset[fx.Node]


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
    graph = local_graph(OpView(node), strategy, axes)
    holders = graph.find_nodes(op="placeholder")
    flowing = {holder for holder, wants in zip(holders, wants_gradient, strict=True) if wants}
    nodes = tuple(n for n in graph.nodes if n.op == "call_function")
    if len(nodes) == 1 and nodes[0].target is node.target:
        return None
    for call in nodes:
        if op_name(call) != "detach" and flowing.intersection(call.all_input_nodes):
            flowing.add(call)
    return Calls(nodes, frozenset(flowing))


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
    for node in calls.nodes:
        if op_name(node) == "convert":
            source: fx.Node = node.args[0]  # type: ignore[assignment]
            before, after = size_of(source.meta["val"]), size_of(node.meta["val"])
            axis, there, back = str(node.args[5]), str(node.args[1]), str(node.args[2])
            seconds = leg_s(axis, there, before, after)
            forward += seconds
            again += seconds if recompute == "full" else 0.0
            if node in calls.flowing:
                backward += leg_s(axis, back, after, before)
            continue
        work = op_work(node, calls.flowing)
        own = seconds_of(work, machine)
        product = node_work(node).matmul
        forward += own.forward
        if recompute == "full" or (recompute == "selective" and not product):
            again += own.forward
        if node in calls.flowing:
            backward += own.backward_input + own.backward_weight
            saved += 0.0 if product else work.saved_bytes
    return forward, backward + again, saved if recompute == "none" else 0.0


def _sized(node: fx.Node) -> bool:
    return all(type(n) is int for n in node.meta["val"].shape)
