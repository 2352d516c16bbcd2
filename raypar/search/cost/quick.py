"""Costs of ops as they were captured, without tracing their backward: what planners add up.

Every op becomes a few pieces of `Work`: its forward, and what autograd will make of it. A matrix
product has one more of the same size for each operand that wants a gradient; a norm, a softmax or a
gather has one op of its class; a sum has none. Ops of equal form are looked at once, so that graphs
of 100,000 ops take about a second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import fx

from raypar.graph.costs import numel, size_of
from raypar.graph.passes.emit import is_op, op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.work import (
    BACKWARD_KIND,
    RECURRENT_BACKWARD_CALLS,
    RECURRENT_BACKWARD_FLOPS,
    VIEW,
    Work,
    first_tensor,
    is_free,
    node_work,
)
from raypar.sharding.rules.base import Strategy


class OpWork(NamedTuple):
    """What training does for one captured op.

    Attributes:
        forward: Work of its forward pass.
        backward_input: Work for the gradients of values.
        backward_weight: Work for the gradients of parameters.
        saved_bytes: What its backward needs of its own result, roughly: held per microbatch when
            nothing is recomputed.
        kept_bytes: The same when cheap ops are recomputed: 0 unless it is a matrix product.
    """

    forward: tuple[Work, ...]
    backward_input: tuple[Work, ...]
    backward_weight: tuple[Work, ...]
    saved_bytes: float
    kept_bytes: float

    def scaled(self, share: float) -> OpWork:
        """The same on a share of the data."""
        if share == 1.0:
            return self
        return OpWork(
            tuple(w.scaled(share) for w in self.forward),
            tuple(w.scaled(share) for w in self.backward_input),
            tuple(w.scaled(share) for w in self.backward_weight),
            self.saved_bytes * share,
            self.kept_bytes * share,
        )


class OpSeconds(NamedTuple):
    """Seconds of one captured op: forward, and the two halves of its backward."""

    forward: float
    backward_input: float
    backward_weight: float


# Ops whose backward hands the gradient on as it is.
_PASS_ON = frozenset("add sub add_ sub_ rsub".split())
# Ops whose backward reads neither inputs nor result.
_SAVE_NOTHING = frozenset(
    "add sub rsub neg sum mean cat stack copy clone _to_copy to pad constant_pad_nd roll flip "
    "embedding apply_mask where index_select gather".split()
)
_NO_GRADIENT = frozenset(
    "eq ne lt le gt ge argmax argmin arange zeros ones full zeros_like ones_like full_like "
    "detach one_hot bitwise_and bitwise_or logical_and logical_or logical_not sign floor ceil "
    "round empty empty_like new_zeros new_ones isnan isfinite any all".split()
)


def op_work(node: fx.Node, wanting: Collection[fx.Node] | None = None) -> OpWork:
    """What training does for one op of a captured (or local) forward graph.

    Args:
        node: The call.
        wanting: Operands that want a gradient, if that is known; else it is told by what they are.
    """
    forward = node_work(node)
    if forward.kind == "none":
        return OpWork((), (), (), 0.0, 0.0)
    out = first_tensor(node)
    out_bytes = float(size_of(node.meta.get("val")))
    differentiable = out is not None and out.is_floating_point()
    name = op_name(node)
    if is_free(node) or forward is VIEW:
        back = (VIEW,) if differentiable else ()
        return OpWork((VIEW,), back, (), 0.0, 0.0)
    if not differentiable or name in _NO_GRADIENT:
        return OpWork((forward,), (), (), 0.0, 0.0)
    values, weights = _operands(node)
    if wanting is not None:
        values, weights = ([n for n in found if n in wanting] for found in (values, weights))
    if forward.matmul:
        return _product(node, name, forward, values, weights, out_bytes)
    return _elementwise(name, forward, values, weights, out_bytes)


def _operands(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Operands that want a gradient: values, and parameters."""
    values: list[fx.Node] = []
    weights: list[fx.Node] = []
    for operand in node.all_input_nodes:
        value = first_tensor(operand)
        if value is None or not value.is_floating_point():
            continue
        kind = _source(operand)
        if kind == "param":
            weights.append(operand)
        elif kind not in ("in", "const", "buffer", "rng", "global"):
            values.append(operand)
    return values, weights


def _source(node: fx.Node) -> str:
    """Kind of placeholder behind a value (through views), or ``op``."""
    while node.op == "call_function" and is_op(node) and is_free(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return str(node.meta.get("id", "")).partition(":")[0] if node.op == "placeholder" else "op"


def _product(
    node: fx.Node,
    name: str,
    forward: Work,
    values: Sequence[fx.Node],
    weights: Sequence[fx.Node],
    out_bytes: float,
) -> OpWork:
    back = forward._replace(kind=BACKWARD_KIND.get(forward.kind, forward.kind))
    fused = forward.kind in ("attention", "recurrent")
    if fused:  # one op for all operands: all of it is in the input half
        attention = forward.kind == "attention"
        times = 2.5 if attention else RECURRENT_BACKWARD_FLOPS
        whole = back._replace(
            flops=times * back.flops,
            nbytes=2 * back.nbytes,
            padded=times * back.padded,
            calls=1.0 if attention else RECURRENT_BACKWARD_CALLS * back.calls,
        )
        return OpWork((forward,), (whole,), (), out_bytes, out_bytes)
    large = [w for w in weights if _dims(w) > 1]
    # A bias gradient is the sum of the output's gradient over its rows.
    sums = [Work(0.0, out_bytes, forward.dtype, False, "reduce") for w in weights if _dims(w) == 1]
    return OpWork(
        (forward,),
        (back,) * len([v for v in values if _dims(v) > 1]),
        (*((back,) * len(large)), *sums),
        out_bytes,
        out_bytes,
    )


def _elementwise(
    name: str,
    forward: Work,
    values: Sequence[fx.Node],
    weights: Sequence[fx.Node],
    out_bytes: float,
) -> OpWork:
    kind = BACKWARD_KIND.get(forward.kind, forward.kind)
    first: list[Work] = []
    second: list[Work] = []
    if name in _PASS_ON:
        # Where an operand was expanded, its gradient is summed up (the FLOPs of such an op are the
        # elements it makes); where it was widened, it is narrowed.
        for group, found in ((values, first), (weights, second)):
            for operand in group:
                if _numel(operand) < forward.flops:
                    found.append(Work(0.0, out_bytes, forward.dtype, False, "reduce"))
                elif size_of(operand.meta.get("val")) < out_bytes:
                    narrowed = out_bytes + size_of(operand.meta.get("val"))
                    found.append(Work(0.0, narrowed, forward.dtype, False, "copy"))
    elif kind in ("scatter", "plain") and weights and not values:
        table = sum(size_of(w.meta.get("val")) for w in weights)
        second.append(Work(0.0, out_bytes + table, forward.dtype, False, kind))
    elif name == "cross_entropy_loss":
        source = values[0] if values else None
        large = 3.0 * size_of(source.meta.get("val")) if source is not None else 0.0
        first.append(Work(0.0, large, forward.dtype, False, kind))
    elif kind == "scatter":  # into zeros of the operand's size
        table = sum(size_of(v.meta.get("val")) for v in values)
        first.append(Work(0.0, forward.nbytes + table, forward.dtype, False, kind))
    else:
        traffic = 1.5 * forward.nbytes if kind.endswith("backward") else forward.nbytes
        first += [Work(0.0, traffic, forward.dtype, False, kind)] * (
            max(1, len(values)) if kind == "plain" else 1
        )
    saved = 0.0 if name in _SAVE_NOTHING else out_bytes
    return OpWork((forward,), tuple(first), tuple(second), saved, 0.0)


def _numel(node: fx.Node) -> int:
    value = first_tensor(node)
    return 0 if value is None else numel(value)


def _dims(node: fx.Node) -> int:
    value = first_tensor(node)
    return 0 if value is None else value.dim()


def share_of(strategy: Strategy, mesh: Sequence[int]) -> float:
    """Which share of an op one rank computes: every axis on which anything is cut divides it."""
    parts = 1
    for axis, size in enumerate(mesh):
        specs = (*strategy.inputs, *strategy.outputs)
        if any(spec[axis][0] == "S" for spec in specs):
            parts *= size
    return 1.0 / parts


def seconds_of(work: OpWork, machine: MeshMachine) -> OpSeconds:
    """How long an op takes on the slowest device of a mesh."""
    return OpSeconds(
        sum(w.seconds(machine) for w in work.forward),
        sum(w.seconds(machine) for w in work.backward_input),
        sum(w.seconds(machine) for w in work.backward_weight),
    )


class QuickCosts(NamedTuple):
    """Costs of many ops, one row for each, in the order they were given.

    Attributes:
        seconds: ``[ops, 3]``: forward, backward input half, backward weight half.
        saved_bytes: ``[ops]``: held per microbatch when nothing is recomputed.
        kept_bytes: ``[ops]``: held when cheap ops are recomputed.
        flops: ``[ops]``: forward floating-point operations.
    """

    seconds: np.ndarray
    saved_bytes: np.ndarray
    kept_bytes: np.ndarray
    flops: np.ndarray


def quick_costs(nodes: Iterable[fx.Node], machine: MeshMachine) -> QuickCosts:
    """Costs of ops at the size they have in their graph; see `OpWork`.

    Args:
        nodes: Calls of a captured graph (``graph.local(batch).ops``) or of a local one.
        machine: The mesh whose slowest device runs them.
    """
    rows: list[int] = []
    known: dict[object, int] = {}
    table: list[tuple[float, ...]] = []
    shapes: dict[fx.Node, object] = {}
    for node in nodes:
        key = _signature(node, shapes)
        row = known.get(key)
        if row is None:
            row = known[key] = len(table)
            work = op_work(node)
            flops = sum(w.flops for w in work.forward)
            table.append((*seconds_of(work, machine), work.saved_bytes, work.kept_bytes, flops))
        rows.append(row)
    if not rows:
        return QuickCosts(np.zeros((0, 3)), *(np.zeros(0) for _ in range(3)))
    found = np.asarray(table)[np.asarray(rows)]
    return QuickCosts(found[:, :3], found[:, 3], found[:, 4], found[:, 5])


def _signature(node: fx.Node, shapes: dict[fx.Node, object]) -> object:
    """What the cost of an op depends on."""
    operands = tuple([_form(i, shapes) for i in node.all_input_nodes])
    plain = tuple([a for a in node.args if isinstance(a, (str, int, bool, float))])
    causal = node.kwargs.get("is_causal")
    groups = node.args[6:] if "conv" in str(node.target) else ()
    return node.target, operands, plain, causal, str(groups), _form(node, shapes)


def _form(node: fx.Node, shapes: dict[fx.Node, object]) -> object:
    found = shapes.get(node)
    if found is None:
        value = node.meta.get("val")
        items = value if isinstance(value, (list, tuple)) else (value,)
        form = tuple(
            (tuple(n if isinstance(n, int) else 1 for n in v.shape), v.dtype)
            for v in items
            if isinstance(v, torch.Tensor)
        )
        found = shapes[node] = (_source(node), form)
    return found
