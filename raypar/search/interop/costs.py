"""What every unit costs on a mesh under chosen strategies: quick figures for the pipeline search.

From the local forward graph alone (`raypar.search.cost.quick`); what is saved follows from what each
kind of op needs again. `raypar.search.cost.analytic` looks at the real programs; a plan that is
chosen here is judged there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from raypar.graph.costs import is_view, size_of
from raypar.graph.passes.emit import is_op, op_name
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.quick import quick_costs
from raypar.search.cost.work import kind_of, node_work
from raypar.sharding.convert import COLLECTIVES, conversion
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
    """Figures per unit, for one microbatch on one replica unless said otherwise.

    Attributes:
        forward: Seconds of compute and collectives.
        backward: The same for backward, without recomputation.
        cheap: Seconds of the ops that ``selective`` computes again.
        saved: Recompute policy → bytes held from forward to backward.
        largest: Bytes that the largest op touches.
        sync: Seconds once a step: gradients summed up, parameters gathered.
        optimizer: Seconds once a step.
        state: Bytes of parameters, gradients and optimizer states.
    """

    forward: np.ndarray
    backward: np.ndarray
    cheap: np.ndarray
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    largest: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sync: np.ndarray = field(default_factory=lambda: np.zeros(0))
    optimizer: np.ndarray = field(default_factory=lambda: np.zeros(0))
    state: np.ndarray = field(default_factory=lambda: np.zeros(0))


def unit_costs(
    graph: fx.Graph,
    unit_of: Mapping[str, int],
    n_units: int,
    machine: MeshMachine,
    layouts: Mapping[str, ParamLayout],
    trainable: Mapping[str, bool],
    optimizer_states: int,
) -> UnitCosts:
    """Adds up the ops of every unit.

    Args:
        graph: A lowered graph.
        unit_of: Op id (and ``param:NAME``) → unit.
        n_units: Number of units.
        machine: The mesh.
        layouts: Parameter name → how it lies on the mesh.
        trainable: Parameter name → whether it receives a gradient.
        optimizer_states: Tensors that the optimizer keeps for each parameter.
    """
    zero = np.zeros(n_units)
    found = UnitCosts(zero.copy(), zero.copy(), zero.copy(), largest=zero.copy())
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
    _parameters(found, graph, unit_of, machine, layouts, trainable, optimizer_states)
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


def _parameters(
    found: UnitCosts,
    graph: fx.Graph,
    unit_of: Mapping[str, int],
    machine: MeshMachine,
    layouts: Mapping[str, ParamLayout],
    trainable: Mapping[str, bool],
    optimizer_states: int,
) -> None:
    n = len(found.forward)
    found.sync, found.optimizer, found.state = np.zeros(n), np.zeros(n), np.zeros(n)
    axes = machine.mesh.named
    sizes = [size for _, size in axes]
    moved: dict[tuple[int, str, str], float] = {}
    stored_bytes, tensors = np.zeros(n), np.zeros(n)
    for node in graph.find_nodes(op="placeholder"):
        key = str(node.meta["id"])
        if not key.startswith("param:"):
            continue
        layout, unit = layouts[key[6:]], unit_of[key]
        item = node.meta["val"].element_size()
        held = item * int(np.prod(layout.held.local_shape(layout.shape, sizes)))
        stored = item * int(np.prod(layout.stored.local_shape(layout.shape, sizes)))
        found.state[unit] += stored if layout.in_program else held
        if not trainable.get(key[6:], True):
            continue
        found.state[unit] += stored if layout.zero >= 2 else held
        found.state[unit] += optimizer_states * stored
        stored_bytes[unit] += stored
        tensors[unit] += 1
        if layout.in_program:
            continue
        for step in conversion(layout.stored, layout.held):
            for kind in (step.forward, step.backward):
                if kind in COLLECTIVES and axes[step.axis][1] > 1:
                    place = (unit, axes[step.axis][0], kind)
                    moved[place] = moved.get(place, 0.0) + held
    for (unit, axis, kind), nbytes in moved.items():
        found.sync[unit] += machine.collective_s(axis, kind, nbytes)
    for unit in range(n):
        if stored_bytes[unit]:
            found.optimizer[unit] = machine.optimizer_s(stored_bytes[unit], int(tensors[unit]))


def spread(values: np.ndarray, twins: Sequence[int]) -> np.ndarray:
    """Figures of all units from those that stand for them."""
    return values[np.asarray(twins)]
