"""What every plan has to compute: the kernels behind each op of a model, and what they take.

However a plan cuts, replicates and shards a model, every op of it runs on all ranks of its stage,
once per microbatch, and its autograd formula runs there as well. Each op is traced alone, so that
only what its own formula does is counted: additions of gradients that meet, views, and copies for
the sake of strides come and go with the cuts, and are left out.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from raypar.graph.even import even
from raypar.graph.opgraph import OpGraph
from raypar.graph.turns import in_turn
from raypar.search.bounds.one_op import (
    TRACES,
    Kernel,
    TracedOp,
    Wants,
    is_sized,
    trace_op,
)
from raypar.search.cost.work import node_work
from raypar.search.intra.settings import Graph, Value, read_graph
from raypar.sharding.strategies import call_key


def kernels_of(graph: OpGraph, local_batch: int, *, exactly: bool = False) -> tuple[Kernel, ...]:
    """The kernels of one microbatch of `local_batch` samples on one replica.

    Args:
        graph: The captured model.
        local_batch: Samples.
        exactly: Whether the model is captured at that size. Else, where samples do not meet, it is
            captured at two sizes: a kernel's size is a constant and a share per sample, so that
            all others lie on the line through them.

    Raises:
        PlanError: The model cannot be captured at that size.
    """
    known: dict[int, tuple[Kernel, ...]] = graph.memo.setdefault("bound kernels", {})
    if local_batch not in known:
        ends = [] if exactly or graph.feels_microbatches else _line(graph)
        found: tuple[Kernel, ...] = ()
        if ends and local_batch not in ends:
            small, large = (kernels_of(graph, b, exactly=True) for b in ends)
            found = _between(small, large, ends, local_batch)
        known[local_batch] = found or _kernels(graph, local_batch)
    return known[local_batch]


def _line(graph: OpGraph) -> list[int]:
    """Two batch sizes through which the others are found; fewer where there are no others."""
    total = graph.global_batch
    return [] if total < 4 else [next(b for b in range(total // 2, 0, -1) if total % b == 0), total]


def _between(
    small: tuple[Kernel, ...], large: tuple[Kernel, ...], ends: list[int], at: int
) -> tuple[Kernel, ...]:
    """Kernels at another batch size; none where both ends do not run the same ones."""
    share = (at - ends[0]) / (ends[1] - ends[0])
    found = []
    if len(small) != len(large):
        return ()
    chains_alike = all(a.chained == b.chained for a, b in zip(small, large, strict=True))
    for a, b in zip(small, large, strict=True):
        if _without_sizes(a) != _without_sizes(b):
            return ()
        flops, nbytes, kept, most_kept = (
            x + (y - x) * share for x, y in zip(_sizes(a), _sizes(b), strict=True)
        )
        if min(flops, nbytes, kept, most_kept) < 0:
            return ()
        chained = a.chained if chains_alike else 0  # no chain is a valid one, too
        found.append(
            a._replace(flops=flops, nbytes=nbytes, kept=kept, most_kept=most_kept, chained=chained)
        )
    return tuple(found)


def _sizes(kernel: Kernel) -> tuple[float, ...]:
    """What grows with the samples of a microbatch."""
    return kernel.flops, kernel.nbytes, kernel.kept, kernel.most_kept


def _without_sizes(kernel: Kernel) -> Kernel:
    return kernel._replace(flops=0.0, nbytes=0.0, kept=0.0, most_kept=0.0, chained=0)


def trained_bytes(graph: OpGraph, local_batch: int) -> dict[int, int]:
    """Bytes of a parameter that receives a gradient → how many such there are.

    Args:
        graph: The captured model.
        local_batch: Samples of a size whose kernels are known.
    """
    kernels_of(graph, local_batch)
    found: dict[int, int] = graph.memo["bound parameters"]
    return found


@in_turn
def _kernels(graph: OpGraph, local_batch: int) -> tuple[Kernel, ...]:
    """Goes through the ops backwards, from the loss, with the gradients that arrive."""
    clean = even(graph).local(local_batch)
    trainable = frozenset(n for n, (_, _, trained) in graph.params.items() if trained)
    read = read_graph(clean, trainable)
    arrived: set[Value] = {value for value, _ in read.outputs if value in read.flow}
    counts: Counter[object] = Counter()
    keys: dict[fx.Node, object] = {}
    found: dict[object, TracedOp] = {}
    for op in reversed(read.ops):
        operands = tuple(_value(operand, read) for operand in op.all_input_nodes)
        wants = Wants(
            tuple(value in read.flow for value in operands),
            tuple(value in arrived for value in read.makes[op]),
        )
        told = call_key(op) if is_sized(op) else None
        key: object = op if told is None else (told, wants, str(op.meta.get("autocast")))
        counts[key] += 1
        keys[op] = key
        if key not in found:
            found[key] = TRACES.find(key, op, wants) if told is not None else trace_op(op, wants)
        given = zip(operands, found[key].gives, strict=True)
        arrived.update(value for value, gives in given if gives and value is not None)
    params = [v for v in arrived if v.id.startswith("param:")]
    graph.memo["bound parameters"] = dict(Counter(v.nbytes for v in params))
    traced = {op: found[key] for op, key in keys.items()}
    chain = _chain(read, traced)
    kept: dict[object, list[int]] = {}
    for op, nbytes in _kept_bytes(read, traced).items():
        kept.setdefault(keys[op], []).append(nbytes)
    kernels = []
    for key, own in found.items():
        forward, back = (sum(keys[op] == key for op in ops) for ops in chain)
        sizes = kept.get(key, [0])
        for at, (kernel, alone) in enumerate(zip(own.kernels, own.alone, strict=True)):
            on = forward if not kernel.backward else back * alone
            made = kernel._replace(times=counts[key], chained=on)
            if at == own.product:
                made = made._replace(kept=float(sum(sizes)), most_kept=float(max(sizes)))
            kernels.append(made)
    return tuple(kernels)


def _kept_bytes(read: Graph, traced: Mapping[fx.Node, TracedOp]) -> dict[fx.Node, int]:
    """Op that is one product → bytes of its results that the backward pass of any op reads.

    Views and copies of a result count as the result. What other ops make is not counted: it can be
    made again from these at little cost.
    """
    found: dict[tuple[fx.Node, int], int] = {}
    for op in read.ops:
        operands = [_value(operand, read) for operand in op.all_input_nodes]
        wanted = [v for v, needed in zip(operands, traced[op].reads, strict=False) if needed]
        wanted += [v for v, n in zip(read.makes[op], traced[op].rereads, strict=False) if n]
        for value in wanted:
            made = None if value is None else _origin(value, read)
            if value is None or made is None or made.node not in traced:
                continue
            if traced[made.node].product is not None:
                nbytes = min(value.nbytes, made.nbytes)
                key = made.node, made.index
                found[key] = max(found.get(key, 0), nbytes)
    totals: dict[fx.Node, int] = {}
    for (op, _), nbytes in found.items():
        totals[op] = totals.get(op, 0) + nbytes
    return totals


def _origin(value: Value, read: Graph) -> Value | None:
    """The value that holds the memory, or could: behind views, casts and copies."""
    while value.node in read.reads and node_work(value.node).kind in ("view", "none", "copy"):
        sources = read.reads[value.node]
        if len(sources) != 1:
            return None
        value = sources[0]
    return value


def _chain(read: Graph, traced: Mapping[fx.Node, TracedOp]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Ops on a path to the loss, and those of them that the gradient passes on its way back.

    Any path will do; this one has the most work.
    """
    longest: dict[fx.Node, float] = {}
    before: dict[fx.Node, fx.Node] = {}
    for op in read.ops:
        sources = [v.node for v in read.reads[op] if v.node in longest]
        own = sum(k.flops + k.nbytes + k.calls for k in traced[op].kernels)
        longest[op] = own + max((longest[s] for s in sources), default=0.0)
        if sources:
            before[op] = max(sources, key=longest.__getitem__)
    ends = [v.node for v, _ in read.outputs if v.node in longest]
    if not ends:
        return [], []
    path = [max(ends, key=longest.__getitem__)]
    back, follows = [], True
    while path[-1] in before:
        op, source = path[-1], before[path[-1]]
        operands = [_value(operand, read) for operand in op.all_input_nodes]
        gives = traced[op].gives
        follows = follows and any(
            value is not None and value.node is source and given
            for value, given in zip(operands, gives, strict=True)
        )
        if follows:
            back.append(op)
        path.append(source)
    return path, back


def _value(operand: fx.Node, read: Graph) -> Value | None:
    """The tensor that a node stands for; None where it stands for no single one."""
    if operand.target is not operator.getitem:
        made = read.makes.get(operand, ())
        return made[0] if len(made) == 1 else None
    source, index = operand.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    made = read.makes.get(source, ())
    tensors = [isinstance(v, torch.Tensor) for v in source.meta["val"]]
    place = sum(tensors[: index % len(tensors)])
    return made[place] if place < len(made) else None
