"""What every plan has to compute: the kernels behind each op of a model, and what they take.

However a plan cuts, replicates and shards a model, every op of it runs on all ranks of its stage,
once per microbatch, and its autograd formula runs there as well. Each op is traced alone, so that
only what its own formula does is counted: additions of gradients that meet, views, and copies for
the sake of strides come and go with the cuts, and are left out.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import is_op, op_name
from raypar.graph.turns import in_turn
from raypar.search.cost.base import StageCode
from raypar.search.cost.exact import StagePieces, stage_pieces
from raypar.search.cost.machine import compute_dtype
from raypar.search.cost.work import is_free, node_work
from raypar.search.intra.settings import Graph, Value, read_graph
from raypar.sharding.rules.base import find_localiser
from raypar.sharding.strategies import call_key

ANY_KIND = "any"
"""Class of a kernel that may run as another one when it is sharded: it goes at the best rate."""
_COMES_AND_GOES = frozenset("add add_ clone copy copy_ _to_copy to convert detach alias".split())


class Kernel(NamedTuple):
    """One kernel of one microbatch on one replica, and how often the model has it.

    Attributes:
        times: How many ops have it.
        flops: Floating-point operations.
        nbytes: Bytes read and written that no sharding avoids.
        dtype: What it computes in.
        matmul: Whether it is a product.
        kind: Class as in `raypar.search.cost.work.Work`, or `ANY_KIND`.
        calls: Small ops that it runs inside, one after the other.
        backward: Whether it belongs to the backward pass.
        chained: How many of them one microbatch goes through one after the other: on a path from
            an input to the loss and, as far as gradients follow it, back.
    """

    times: int
    flops: float
    nbytes: float
    dtype: str
    matmul: bool
    kind: str
    calls: float
    backward: bool
    chained: int = 0


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
        if a._replace(flops=0.0, nbytes=0.0, chained=0) != b._replace(
            flops=0.0, nbytes=0.0, chained=0
        ):
            return ()
        flops = a.flops + (b.flops - a.flops) * share
        nbytes = a.nbytes + (b.nbytes - a.nbytes) * share
        if flops < 0 or nbytes < 0:
            return ()
        chained = a.chained if chains_alike else 0  # no chain is a valid one, too
        found.append(a._replace(flops=flops, nbytes=nbytes, chained=chained))
    return tuple(found)


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
    clean = graph.local(local_batch)
    trainable = frozenset(n for n, (_, _, trained) in graph.params.items() if trained)
    read = read_graph(clean, trainable)
    arrived: set[Value] = {value for value, _ in read.outputs if value in read.flow}
    counts: Counter[object] = Counter()
    keys: dict[fx.Node, object] = {}
    found: dict[object, _Traced] = {}
    for op in reversed(read.ops):
        operands = tuple(_value(operand, read) for operand in op.all_input_nodes)
        wants = _Wants(
            tuple(value in read.flow for value in operands),
            tuple(value in arrived for value in read.makes[op]),
        )
        told = call_key(op) if _sized(op) else None
        key: object = op if told is None else (told, wants, str(op.meta.get("autocast")))
        counts[key] += 1
        keys[op] = key
        if key not in found:
            found[key] = _TRACES.find(key, op, wants) if told is not None else _traced(op, wants)
        given = zip(operands, found[key].gives, strict=True)
        arrived.update(value for value, gives in given if gives and value is not None)
    params = [v for v in arrived if v.id.startswith("param:")]
    graph.memo["bound parameters"] = dict(Counter(v.nbytes for v in params))
    chain = _chain(read, {op: found[key] for op, key in keys.items()})
    kernels = []
    for key, own in found.items():
        forward, back = (sum(keys[op] == key for op in ops) for ops in chain)
        for kernel, alone in zip(own.kernels, own.alone, strict=True):
            on = forward if not kernel.backward else back * alone
            kernels.append(kernel._replace(times=counts[key], chained=on))
    return tuple(kernels)


def _chain(read: Graph, traced: Mapping[fx.Node, _Traced]) -> tuple[list[fx.Node], list[fx.Node]]:
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


class _Wants(NamedTuple):
    """Which operands of an op want a gradient, and for which tensor results one arrives."""

    operands: tuple[bool, ...]
    results: tuple[bool, ...]


class _Traced(NamedTuple):
    """What an op runs.

    Attributes:
        kernels: Its kernels.
        alone: Per kernel whether it makes gradients of values only: what makes one of a parameter
            may be put off or, where it makes both, be taken apart (zero bubble schedules).
        gives: Per operand whether it gets a gradient.
    """

    kernels: tuple[Kernel, ...]
    alone: tuple[bool, ...]
    gives: tuple[bool, ...]


class _Traces:
    """The last ops that were traced, of any model."""

    most = 2048

    def __init__(self) -> None:
        self.known: OrderedDict[object, _Traced] = OrderedDict()

    def find(self, key: object, node: fx.Node, wants: _Wants) -> _Traced:
        """Kernels of an op; `key` says all that they depend on."""
        if key not in self.known:
            self.known[key] = _traced(node, wants)
            if len(self.known) > self.most:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]


_TRACES = _Traces()


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


def _traced(node: fx.Node, wants: _Wants) -> _Traced:
    """The kernels of one op: its forward, and what its own autograd formula adds."""
    nothing = (False,) * len(wants.operands)
    if not _sized(node):
        # How much it does is known when it runs; its operands get gradients as far as can be told.
        return _Traced((), (), wants.operands if any(wants.results) else nothing)
    pieces = stage_pieces(_alone(node, wants))
    rewritten = find_localiser(op_name(node)) is not None
    forward = set(pieces.forward.nodes)
    joint = pieces.joint
    nodes = list(pieces.forward.nodes) if joint is None else list(joint.graph.nodes)
    sums = _bias_sums(node, pieces)
    late = _for_parameters(node, pieces)
    kernels: list[Kernel] = []
    alone: list[bool] = []
    for one in nodes:
        if one.op == "call_function" and is_op(one):
            backward = one not in forward
            certain = one.target is node.target if not backward else one in sums
            found = _kernel(one, rewritten, backward, certain)
            if found is not None:
                kernels.append(found)
                alone.append(one not in late)
    if joint is None:
        return _Traced(tuple(kernels), tuple(alone), nothing)
    made = {at for at, g in zip(joint.wrt, joint.gradients, strict=True) if g is not None}
    return _Traced(
        tuple(kernels), tuple(alone), tuple(i in made for i in range(len(wants.operands)))
    )


def _for_parameters(node: fx.Node, pieces: StagePieces) -> set[fx.Node]:
    """What the gradients of parameters are made of."""
    if pieces.joint is None:
        return set()
    operands = node.all_input_nodes
    stack = [
        gradient
        for at, gradient in zip(pieces.joint.wrt, pieces.joint.gradients, strict=True)
        if gradient is not None and operands[at].op == "placeholder"
    ]
    found: set[fx.Node] = set()
    while stack:
        made = stack.pop()
        if made not in found:
            found.add(made)
            stack += made.all_input_nodes
    return found


def _sized(call: fx.Node) -> bool:
    """Whether all sizes of an op's operands and results are known."""
    for node in (call, *call.all_input_nodes):
        value = node.meta.get("val")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                sizes = (*item.shape, *item.stride())
                if not all(isinstance(n, int) for n in sizes):
                    return False
    return True


def _alone(node: fx.Node, wants: _Wants) -> StageCode:
    """A stage that consists of one op, whose operands arrive."""
    graph = fx.Graph()
    holders: dict[fx.Node, fx.Node] = {}
    for i, operand in enumerate(node.all_input_nodes):
        holders[operand] = graph.placeholder(f"operand{i}")
        holders[operand].meta = {**operand.meta, "id": f"edge:{i}"}
    copy = graph.node_copy(node, holders.__getitem__)
    copy.meta = dict(node.meta)
    results = _results(graph, copy)
    graph.output(tuple(results))
    gradients = tuple(i for i, flows in enumerate(wants.results) if flows)
    wanted = tuple(str(i) for i, flows in enumerate(wants.operands) if flows)
    return StageCode(
        graph=graph,
        differentiable=wanted if gradients else (),
        outputs_with_grad=gradients,
        edges_out=tuple(f"result{i}" for i in range(len(results))),
    )


def _results(graph: fx.Graph, call: fx.Node) -> list[fx.Node]:
    value: Any = call.meta.get("val")
    if not isinstance(value, (list, tuple)):
        return [call]
    found = []
    for i, item in enumerate(value):
        if isinstance(item, torch.Tensor):
            piece = graph.call_function(operator.getitem, (call, i))
            piece.meta = {"val": item, "id": f"{call.meta.get('id')}[{i}]"}
            found.append(piece)
    return found


def _bias_sums(node: fx.Node, pieces: StagePieces) -> set[fx.Node]:
    """The sums over rows that make the gradients of what a product adds to every row."""
    if pieces.joint is None or not node_work(node).matmul:
        return set()
    found = set()
    for gradient in pieces.joint.gradients:
        while gradient is not None and is_op(gradient) and is_free(gradient):
            source = gradient.args[0]
            gradient = source if isinstance(source, fx.Node) else None
        if gradient is not None and is_op(gradient) and op_name(gradient) == "sum":
            found.add(gradient)
    return found


def _kernel(node: fx.Node, rewritten: bool, backward: bool, certain: bool) -> Kernel | None:
    """What a call does at the least; None where a plan may do without it.

    Args:
        node: The call.
        rewritten: Whether its op may be written as other ops where it is sharded.
        backward: Whether it belongs to the backward pass.
        certain: Whether it is the op itself, or a sum that has to be.
    """
    name = op_name(node)
    work = node_work(node)
    if work.kind in ("view", "none"):
        return None
    dtype = compute_dtype(work.dtype)
    if work.matmul:
        nbytes = work.nbytes - _added_bytes(node, name)
        return Kernel(1, work.flops, nbytes, dtype, True, work.kind, work.calls, backward)
    # Of what a formula does element by element, only its own backward kernel is certain to run.
    if not certain and (name in _COMES_AND_GOES or (backward and "backward" not in name)):
        return None
    kind = ANY_KIND if rewritten or work.kind == "random" else work.kind
    return Kernel(1, 0.0, work.nbytes, dtype, False, kind, 1.0, backward)


def _added_bytes(node: fx.Node, name: str) -> float:
    """Bytes of what a product adds, which a sharded one may add later."""
    if not name.startswith(("addmm", "baddbmm", "addmv")):
        return 0.0
    value = node.all_input_nodes[0].meta.get("val")
    return float(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0.0
