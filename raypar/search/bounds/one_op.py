"""What one op of a model runs, traced alone: its kernels, forward and backward."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.graph.passes.emit import is_op, op_name
from raypar.search.cost.base import StageCode
from raypar.search.cost.exact import StagePieces, stage_pieces
from raypar.search.cost.machine import compute_dtype
from raypar.search.cost.work import is_free, node_work
from raypar.sharding.rules.base import find_localiser

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
        kept: Bytes of what all of them make and the backward pass reads: it is held from the
            forward to the backward pass of a microbatch, or the kernel runs again.
        most_kept: The most that one of them makes of it.
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
    kept: float = 0.0
    most_kept: float = 0.0


class Wants(NamedTuple):
    """Which operands of an op want a gradient, and for which tensor results one arrives."""

    operands: tuple[bool, ...]
    results: tuple[bool, ...]


class TracedOp(NamedTuple):
    """What an op runs.

    Attributes:
        kernels: Its kernels.
        alone: Per kernel whether it makes gradients of values only: what makes one of a parameter
            may be put off or, where it makes both, be taken apart (zero bubble schedules).
        gives: Per operand whether it gets a gradient.
        reads: Per operand whether the backward pass reads it.
        rereads: Per tensor result the same.
    """

    kernels: tuple[Kernel, ...]
    alone: tuple[bool, ...]
    gives: tuple[bool, ...]
    reads: tuple[bool, ...] = ()
    rereads: tuple[bool, ...] = ()

    @property
    def product(self) -> int | None:
        """Position of the one product of its forward pass; None where there is none, or more."""
        found = [i for i, k in enumerate(self.kernels) if k.matmul and not k.backward]
        return found[0] if len(found) == 1 else None


class Traces:
    """The last ops that were traced, of any model."""

    most = 2048

    def __init__(self) -> None:
        self.known: OrderedDict[object, TracedOp] = OrderedDict()

    def find(self, key: object, node: fx.Node, wants: Wants) -> TracedOp:
        """Kernels of an op; `key` says all that they depend on."""
        if key not in self.known:
            self.known[key] = trace_op(node, wants)
            if len(self.known) > self.most:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]


TRACES = Traces()


def trace_op(node: fx.Node, wants: Wants) -> TracedOp:
    """The kernels of one op: its forward, and what its own autograd formula adds."""
    nothing = (False,) * len(wants.operands)
    if not is_sized(node):
        # How much it does is known when it runs; its operands get gradients as far as can be told.
        return TracedOp((), (), wants.operands if any(wants.results) else nothing)
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
        return TracedOp(tuple(kernels), tuple(alone), nothing)
    made = {at for at, g in zip(joint.wrt, joint.gradients, strict=True) if g is not None}
    gives = tuple(i in made for i in range(len(wants.operands)))
    if rewritten or pieces.parts is None:  # sharded, it is other ops, which read other values
        return TracedOp(tuple(kernels), tuple(alone), gives)
    read = {*pieces.parts.kept, *pieces.parts.saved}
    return TracedOp(
        tuple(kernels),
        tuple(alone),
        gives,
        tuple(holder in read for holder in joint.inputs),
        tuple(isinstance(result, fx.Node) and result in read for result in joint.outputs),
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


def is_sized(call: fx.Node) -> bool:
    """Whether all sizes of an op's operands and results are known."""
    for node in (call, *call.all_input_nodes):
        value = node.meta.get("val")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                sizes = (*item.shape, *item.stride())
                if not all(isinstance(n, int) for n in sizes):
                    return False
    return True


def _alone(node: fx.Node, wants: Wants) -> StageCode:
    """A stage that consists of one op.

    Its operands are its parameters, even where they are values that arrive: of a stage that
    receives values, fused backward kernels are taken apart, into calls that together do more.
    """
    graph = fx.Graph()
    holders: dict[fx.Node, fx.Node] = {}
    for i, operand in enumerate(node.all_input_nodes):
        holders[operand] = graph.placeholder(f"operand{i}")
        holders[operand].meta = {**operand.meta, "id": f"param:{i}"}
    copy = graph.node_copy(node, holders.__getitem__)
    copy.meta = dict(node.meta)
    results = _results(graph, copy)
    graph.output(tuple(results))
    gradients = tuple(i for i, flows in enumerate(wants.results) if flows)
    wanted = tuple(str(i) for i, flows in enumerate(wants.operands) if flows)
    return StageCode(
        graph=graph,
        trainable=wanted if gradients else (),
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
