"""StageProgram: one stage as runnable code on one device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from raypar.graph.costs import data_dependent
from raypar.graph.replay import replay
from raypar.programs.codegen import Program, compile_piece
from raypar.programs.joint import trace_joint
from raypar.programs.partition import partition, saved_bytes
from raypar.programs.policy import recomputable
from raypar.programs.products import Gradient, products
from raypar.programs.recurrent import fuse_recurrent
from raypar.programs.wire import Wire, unpack

Sink = Callable[[int, Gradient], None]
"""Takes the gradient of a parameter, by its index."""


@dataclass
class StageProgram:
    """The compiled programs of a stage.

    All programs take their arguments in a list that they empty.

    Attributes:
        inputs: Ids of the forward arguments, in order (``param:``, ``buffer:``, ``in:``,
            ``edge:``, ``global:``, ``const:``, ``rng``).
        n_outputs: Forward returns this many outputs (edges, loss, buffer updates), then the saved
            values.
        kept: Positions of the forward arguments that backward needs again, in order.
        tangent_outputs: Positions of the outputs whose gradients backward takes, in order.
        input_gradients: Edge id → index in what `backward` returns, or None where the received
            value gets no gradient here.
        weight_gradients: Parameter names in the order of the sink's indices.
        products: Those that are delivered as products (`raypar.programs.products`).
        ready_order: Sink indices in the order in which backward delivers them.
        forward: ``forward(box) -> [outputs..., saved...]``.
        backward: ``backward(box, sink) -> input gradients``; box = kept, saved, tangents.
        backward_input: ``backward_input(box) -> [input gradients..., weight box...]``.
        backward_weight: ``backward_weight(weight box, sink)``.
        n_inputs_grad: Number of input gradients returned.
        weight_kept: Positions in backward's box that the weight half needs, in order.
        saved_bytes: Predicted bytes held from forward to backward (saved values, and received
            edges and changing buffers that backward reads again).
        half_bytes: Predicted bytes held between the input half and the weight half of backward;
            0 where the stage has no input gradients and does all of backward at once.
        data_dependent: Whether sizes of what it saves may depend on the data: a program made for
            those of one microbatch (compiled, or recorded) would be wrong for the next.
    """

    inputs: list[str]
    n_outputs: int
    kept: list[int]
    tangent_outputs: list[int]
    input_gradients: dict[str, int | None]
    weight_gradients: list[str]
    ready_order: list[int]
    forward: Program
    backward: Program
    backward_input: Program
    backward_weight: Program
    n_inputs_grad: int
    weight_kept: list[int]
    saved_bytes: int
    half_bytes: int = 0
    products: frozenset[str] = frozenset()
    data_dependent: bool = False


def compile_stage(
    wire: Wire,
    *,
    name: str,
    device: torch.device,
    recompute: str,
    trainable: Collection[str],
    differentiable: Collection[str],
    outputs_with_grad: Sequence[int],
    changing: Collection[str] = (),
) -> StageProgram:
    """Traces, partitions and compiles one stage.

    Args:
        wire: The stage's forward graph as shipped.
        name: Shown in tracebacks.
        device: Where it runs.
        recompute: ``none``, ``selective`` or ``full``.
        trainable: Names of the parameters to differentiate.
        differentiable: Ids of the received values whose producers want a gradient.
        outputs_with_grad: Positions of the outputs that receive one.
        changing: Names of the buffers that forward replaces: what backward reads of them is held
            per microbatch.
    """
    graph = unpack(wire, device)
    fuse_recurrent(graph, device)
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    keys = [n.meta["id"] for n in holders]
    params = [i for i, k in enumerate(keys) if k.startswith("param:") and k[6:] in trainable]
    edges = [i for i, k in enumerate(keys) if k.startswith("edge:") and k[5:] in differentiable]
    wrt = [*edges, *params]
    if not holders or not wrt:
        return _forward_only(graph, keys, name, recompute)
    joint = trace_joint(graph, wrt, outputs_with_grad)
    for node, key in zip(joint.inputs, keys, strict=True):
        node.meta["id"] = key
    parts = partition(joint, recomputable(recompute), set(edges))
    place = {node: i for i, node in enumerate(joint.inputs)}
    n_grads = len(edges)
    weight_sinks = {n_grads + j: j for j in range(len(params))}
    order = {node: i for i, node in enumerate(parts.backward.nodes)}
    # A product is delivered in place of the call that would make it, before its views.
    early = {at: found.node for at, found in products(parts.backward, weight_sinks).items()}
    delivered = {j: early.get(at, parts.backward.outputs[at]) for at, j in weight_sinks.items()}
    ready = [j for j, n in delivered.items() if n is not None]
    ready.sort(key=lambda j: order.get(delivered[j], -1))  # type: ignore[arg-type]
    given = parts.backward.inputs
    own = {n for n in joint.inputs if _held(keys[place[n]], changing)}
    held = [*parts.saved, *(n for n in parts.kept if n in own)]
    later = [n for n in parts.weight_inputs if n not in place or n in own]
    free = [n for n in joint.inputs if n not in own]  # held anyway, as are views of them
    return StageProgram(
        inputs=keys,
        n_outputs=len(joint.outputs),
        kept=[place[n] for n in parts.kept],
        tangent_outputs=joint.differentiated,
        input_gradients={
            keys[p].removeprefix("edge:"): j if joint.gradients[j] is not None else None
            for j, p in enumerate(edges)
        },
        weight_gradients=[keys[p].removeprefix("param:") for p in params],
        ready_order=ready,
        forward=compile_piece(parts.forward, joint.constants, name=f"{name} forward"),
        backward=compile_piece(
            parts.backward, joint.constants, name=f"{name} backward", sinks=weight_sinks
        ),
        backward_input=compile_piece(
            parts.backward_input, joint.constants, name=f"{name} backward_input"
        ),
        backward_weight=compile_piece(
            parts.backward_weight,
            joint.constants,
            name=f"{name} backward_weight",
            sinks={j: j for j in range(len(params))},
        ),
        n_inputs_grad=n_grads,
        weight_kept=[given.index(n) for n in parts.weight_inputs],
        saved_bytes=saved_bytes(held, free),
        half_bytes=saved_bytes([*later, *parts.between], free) if edges else 0,
        products=frozenset(keys[wrt[at]].removeprefix("param:") for at in early),
        data_dependent=any(data_dependent(n.meta.get("val")) for n in joint.graph.nodes),
    )


def _held(key: str, changing: Collection[str]) -> bool:
    """Whether keeping this input costs memory that would otherwise be free."""
    kind, _, name = key.partition(":")
    return kind == "edge" or (kind == "buffer" and name in changing)


def _forward_only(graph: fx.Graph, keys: list[str], name: str, recompute: str) -> StageProgram:
    """A stage with nothing to differentiate: frozen, or made of index arithmetic."""
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")

    def forward(box: list[Any], sink: Sink | None = None) -> list[Any]:
        values = dict(zip(holders, box, strict=True))
        box.clear()
        with torch.no_grad():
            return list(replay(graph, values))

    def nothing(box: list[Any], sink: Sink | None = None) -> list[Any]:
        box.clear()
        return []

    return StageProgram(
        inputs=keys,
        n_outputs=len(output.args[0]),  # type: ignore[arg-type]
        kept=[],
        tangent_outputs=[],
        input_gradients={},
        weight_gradients=[],
        ready_order=[],
        forward=forward,
        backward=nothing,
        backward_input=nothing,
        backward_weight=nothing,
        n_inputs_grad=0,
        weight_kept=[],
        saved_bytes=0,
    )
