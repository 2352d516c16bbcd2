"""What every unit costs on a mesh under chosen strategies: quick figures for the pipeline search.

From the local forward graph alone (`raypar.search.cost.quick`); what is saved follows from what
each kind of op needs again. `raypar.search.cost.analytic` looks at the real programs; a plan that
is chosen here is judged there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from raypar.graph.costs import is_view, size_of
from raypar.graph.passes.emit import is_op, op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import moves
from raypar.search.cost.quick import quick_costs
from raypar.search.cost.work import kind_of, node_work
from raypar.sharding.layout import ParamLayout
from raypar.sharding.listing import collectives_of

_SAVES_OUTPUT = frozenset("relu sigmoid tanh softmax log_softmax exp rsqrt sqrt".split())
_SAVES_NOTHING = frozenset(
    "add sub neg sum mean cat stack clone contiguous to convert expand repeat pad cumsum "
    "constant_pad_nd where masked_fill apply_mask seeded".split()
)
_SMALL = 8
"""A value so much smaller than what it is made of is kept, not computed again."""


@dataclass
class UnitCosts:
    """Figures per unit, for one microbatch on one replica.

    Attributes:
        forward: Seconds of compute and collectives.
        backward: The same for backward, without recomputation.
        cheap: Seconds of the ops that ``selective`` computes again.
        saved: Recompute policy → bytes held from forward to backward.
        largest: Bytes that the largest op touches.
    """

    forward: np.ndarray
    backward: np.ndarray
    cheap: np.ndarray
    largest: np.ndarray
    saved: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class StateCosts:
    """Figures of the parameters per unit.

    Attributes:
        sync: Seconds once a step: gradients summed up, parameters gathered.
        optimizer: Seconds once a step.
        state: Bytes of parameters, gradients and optimizer states.
        gather_forward: Seconds per microbatch that ZeRO-3 adds to forward.
        gather_backward: The same for backward (gathered again, gradients scattered).
    """

    sync: np.ndarray
    optimizer: np.ndarray
    state: np.ndarray
    gather_forward: np.ndarray
    gather_backward: np.ndarray


def unit_costs(
    graph: fx.Graph,
    unit_of: Mapping[str, int],
    n_units: int,
    machine: MeshMachine,
    trainable: Mapping[str, bool],
) -> UnitCosts:
    """Adds up the ops of every unit.

    Args:
        graph: A lowered graph.
        unit_of: Op id (and ``param:NAME``) → unit.
        n_units: Number of units.
        machine: The mesh.
        trainable: Parameter name → whether it receives a gradient.
    """
    zero = np.zeros(n_units)
    found = UnitCosts(zero.copy(), zero.copy(), zero.copy(), zero.copy())
    grads = _need_gradient(graph, trainable)
    ops = [
        n
        for n in graph.nodes
        if n.op == "call_function" and n.target is not torch.ops.raypar.convert.default
    ]
    for node, seconds in zip(ops, quick_costs(ops, machine).seconds, strict=True):
        unit = _unit(node, unit_of)
        found.forward[unit] += seconds[0]
        if node in grads:
            found.backward[unit] += seconds[1] + seconds[2]
        if not _heavy(node):
            found.cheap[unit] += seconds[0]
        if not is_view(node):
            touched = size_of(node.meta.get("val"))
            touched += sum(size_of(i.meta.get("val")) for i in node.all_input_nodes)
            found.largest[unit] = max(found.largest[unit], touched)
    for use in collectives_of(graph):
        unit = unit_of[use.value]
        if use.forward:
            found.forward[unit] += machine.collective_s(use.axis, use.forward, use.nbytes)
        if use.backward:
            found.backward[unit] += machine.collective_s(use.axis, use.backward, use.nbytes)
    found.saved = _saved(graph, grads, unit_of, n_units)
    return found


def _unit(node: fx.Node, unit_of: Mapping[str, int]) -> int:
    return unit_of[str(node.meta["id"]).split(">")[0].split("~")[0]]


def _need_gradient(graph: fx.Graph, trainable: Mapping[str, bool]) -> set[fx.Node]:
    """Values that a gradient flows through."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        key = str(node.meta.get("id", ""))
        if node.op == "placeholder":
            if (key.startswith("param:") and trainable.get(key[6:], True)) or key.startswith(
                "edge:"
            ):
                found.add(node)
            continue
        value = node.meta.get("val")
        items = value if isinstance(value, (list, tuple)) else (value,)
        floating = any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in items)
        name = op_name(node) if is_op(node) else ""
        if floating and name != "detach" and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _heavy(node: fx.Node) -> bool:
    return node_work(node).matmul


def _base(node: fx.Node) -> fx.Node:
    """The value whose memory a view shows."""
    while node.op == "call_function" and is_view(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        if node.target is operator.getitem and not is_view(source):
            break
        node = source
    return node


def _reads_again(node: fx.Node, grads: set[fx.Node]) -> Iterable[fx.Node]:
    """The values that an op's backward needs."""
    if node not in grads or is_view(node):
        return ()
    name = op_name(node)
    inputs = node.all_input_nodes
    if name == "apply_mask":
        return inputs[1:2]
    if name in ("where", "masked_fill"):
        return inputs[:1] if name == "where" else inputs[1:2]
    if name in _SAVES_NOTHING:
        return ()
    if name in _SAVES_OUTPUT:
        return (node,)
    if name == "scaled_dot_product_attention":
        return (*inputs, node)
    if name in ("mul", "div") and len(inputs) == 2:
        return [b for a, b in ((inputs[0], inputs[1]), (inputs[1], inputs[0])) if a in grads]
    if kind_of(name) == "gather":
        return [i for i in inputs if not _floating(i)]
    return inputs


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _saved(
    graph: fx.Graph, grads: set[fx.Node], unit_of: Mapping[str, int], n_units: int
) -> dict[str, np.ndarray]:
    result = {p: np.zeros(n_units) for p in ("none", "selective", "full")}
    counted: dict[str, set[fx.Node]] = {p: set() for p in result}
    sources: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def roots(node: fx.Node) -> tuple[fx.Node, ...]:
        """What ``selective`` keeps so that `node` can be made again."""
        known = sources.get(node)
        if known is None:
            known = (node,)
            small = size_of(node.meta.get("val")) * _SMALL <= max(
                (size_of(i.meta.get("val")) for i in node.all_input_nodes), default=0
            )
            if node.op == "call_function" and is_op(node) and not _heavy(node) and not small:
                parts = [r for i in node.all_input_nodes for r in roots(_base(i))]
                known = tuple(dict.fromkeys(parts))
            sources[node] = known
        return known

    def keep(policy: str, node: fx.Node, unit: int) -> None:
        if node.op != "placeholder" and node not in counted[policy]:
            counted[policy].add(node)
            result[policy][unit] += size_of(node.meta.get("val"))

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        unit = _unit(node, unit_of)
        for value in _reads_again(node, grads):
            base = _base(value)
            keep("none", base, unit)
            for root in roots(base):
                keep("selective", root, unit)
    return result


def state_costs(
    placeholders: Mapping[str, int],
    unit_of: Mapping[str, int],
    n_units: int,
    machine: MeshMachine,
    layouts: Mapping[str, ParamLayout],
    trainable: Mapping[str, bool],
    optimizer_states: int,
) -> StateCosts:
    """Adds up the parameters of every unit.

    Args:
        placeholders: Parameter name → bytes of one element.
        unit_of: ``param:NAME`` → unit.
        n_units: Number of units.
        machine: The mesh, the replicas' axis included.
        layouts: Parameter name → how it lies on the mesh.
        trainable: Parameter name → whether it receives a gradient.
        optimizer_states: Tensors that the optimizer keeps for each parameter.
    """
    found = StateCosts(*(np.zeros(n_units) for _ in range(5)))
    axes = machine.mesh.named
    sizes = [size for _, size in axes]
    once: dict[tuple[int, str, str], float] = {}
    stored_bytes, tensors = np.zeros(n_units), np.zeros(n_units)
    for name, item in placeholders.items():
        layout, unit = layouts[name], unit_of[f"param:{name}"]
        held = item * math.prod(layout.held.local_shape(layout.shape, sizes))
        stored = item * math.prod(layout.stored.local_shape(layout.shape, sizes))
        found.state[unit] += stored if layout.in_program else held
        if not trainable.get(name, True):
            continue
        found.state[unit] += stored if layout.zero >= 2 else held
        found.state[unit] += optimizer_states * stored
        stored_bytes[unit] += stored
        tensors[unit] += 1
        way = (layout.stored, layout.held, layout.shape, item, axes)
        forward, backward = moves(*way), moves(*way, backward=True)
        if layout.in_program:
            gathered = sum(machine.collective_s(*move) for move in forward)
            found.gather_forward[unit] += gathered
            found.gather_backward[unit] += gathered
            found.gather_backward[unit] += sum(machine.collective_s(*move) for move in backward)
            continue
        for move in (*forward, *backward):
            place = (unit, move.axis, move.kind)
            once[place] = once.get(place, 0.0) + move.nbytes
    for (unit, axis, kind), nbytes in once.items():
        found.sync[unit] += machine.collective_s(axis, kind, nbytes)
    for unit in range(n_units):
        if stored_bytes[unit]:
            found.optimizer[unit] = machine.optimizer_s(stored_bytes[unit], int(tensors[unit]))
    return found
