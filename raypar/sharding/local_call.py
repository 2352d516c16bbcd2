"""One op of a sharded program: the calls that a rank makes on its local parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from raypar.errors import PlanError
from raypar.graph.fake_calls import RememberingEmitter, fake_like
from raypar.graph.passes.emit import Emitter
from raypar.sharding.rules.base import LocalCall, OpView, Strategy, find_localiser, is_tensor


def write_local(
    op: OpView,
    strategy: Strategy,
    axes: Sequence[tuple[str, int]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    emit: Emitter,
) -> fx.Node:
    """Writes the local call of an op: what its localiser says, or else the same call.

    A piece (``getitem``) is written like any op: the same call on the node that holds the local
    results.

    Args:
        op: The op at the size of one microbatch on one replica.
        strategy: How it runs; one of `raypar.sharding.strategies.strategies`.
        axes: (name, size) of every mesh axis.
        args: The call's positional arguments, with the local tensors in the states of
            ``strategy.inputs`` in place.
        kwargs: The same for keyword arguments.
        emit: Writes nodes.

    Raises:
        PlanError: The local results have other shapes than the strategy says: the op's rule or
            localiser is wrong.
    """
    call = LocalCall(op, strategy, axes, args, kwargs, emit)
    localise = find_localiser(op.name) if any(_cuts(strategy)) else None
    node = call.same() if localise is None else localise(call)
    _check(call, node)
    return node


def local_graph(op: OpView, strategy: Strategy, axes: Sequence[tuple[str, int]]) -> fx.Graph:
    """What a rank runs for one op alone, as a graph.

    Args:
        op: The op at the size of one microbatch on one replica; its arguments are tensors or plain.
        strategy: How it runs.
        axes: (name, size) of every mesh axis.

    Returns:
        A placeholder for every tensor argument, in call order and of local shape; the local result.
    """
    graph = fx.Graph()
    emit = RememberingEmitter(graph, graph.output(None))
    if "autocast" in op.node.meta:
        emit.anchor.meta["autocast"] = op.node.meta["autocast"]
    mesh = [size for _, size in axes]
    specs = iter(strategy.inputs)

    def local(leaf: fx.Node) -> fx.Node:
        value = leaf.meta["val"]
        with graph.inserting_before(emit.anchor):
            holder = graph.placeholder(leaf.name)
        shape = next(specs).local_shape(tuple(value.shape), mesh)
        holder.meta = {**leaf.meta, "val": fake_like(value, shape)}
        return holder

    args, kwargs = fx.map_arg(op.node.args, local), fx.map_arg(op.node.kwargs, local)
    emit.anchor.args = (write_local(op, strategy, axes, args, kwargs, emit),)  # type: ignore[arg-type]
    return graph


def _cuts(strategy: Strategy) -> list[bool]:
    """For every axis: whether the op does anything else there than compute all of it."""
    specs = (*strategy.inputs, *strategy.outputs)
    axes = range(len(strategy.tags))
    return [bool(strategy.tags[i]) or any(s[i] != "R" for s in specs) for i in axes]


def _check(call: LocalCall, node: fx.Node) -> None:
    value = node.meta.get("val")
    items = value if isinstance(value, (list, tuple)) else (value,)
    found = [list(v.shape) for v in items if is_tensor(v)]
    wanted = [call.local_out(i) for i in range(len(call.op.results))]
    if found != wanted:
        raise PlanError(
            f"op {call.op.node.meta.get('id', call.op.name)!r} as {str(call.strategy)!r} on a mesh "
            f"of {list(call.mesh)} leaves parts of shape {found} where {wanted} was expected: the "
            f"sharding rule or localiser of {call.op.name!r} is wrong"
        )
