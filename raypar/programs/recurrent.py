"""Recurrent layers as one op where torch would unroll them step by step.

On a CPU torch traces a GRU, an RNN or a float64 LSTM as thousands of small ops, and a float32 LSTM
as a fused op whose workspace exists only while autograd runs it. Here each stays one op; its
backward runs the layer again under autograd, so nothing but its inputs is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from raypar.compat import recording
from raypar.graph.passes.emit import bound_args, is_op, op_name

_LIBRARY = torch.library.Library("raypar", "FRAGMENT")
_LIBRARY.define(
    "recurrent(str kind, Tensor input, Tensor[] hidden, Tensor[] params, bool biases, int layers, "
    "bool bidirectional, bool batch_first) -> Tensor[]"
)
_LIBRARY.define(
    "recurrent_backward(str kind, Tensor[] grads, Tensor input, Tensor[] hidden, Tensor[] params, "
    "bool biases, int layers, bool bidirectional, bool batch_first, bool[] wanted) -> Tensor[]"
)
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Recurrent layers, as they are captured."""


def fuse_recurrent(graph: fx.Graph, device: torch.device) -> None:
    """Replaces the recurrent layers that torch would unroll on `device`, in place."""
    for node in list(graph.nodes):
        if device.type != "cpu" or not is_op(node) or op_name(node) not in KINDS:
            continue
        bound, kind = bound_args(node), op_name(node)
        if "batch_sizes" in bound:
            continue  # packed sequences
        hidden = bound["hx"] if isinstance(bound["hx"], (list, tuple)) else [bound["hx"]]
        node.target = torch.ops.raypar.recurrent.default
        node.args = (
            kind,
            bound["input"],
            list(hidden),
            list(bound["params"]),
            bound["has_biases"],
            bound["num_layers"],
            bound["bidirectional"],
            bound["batch_first"],
        )
        node.kwargs = {}


def _layer(
    kind: str,
    input: torch.Tensor,
    hidden: list[torch.Tensor],
    params: list[torch.Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[torch.Tensor]:
    options = (biases, layers, 0.0, True, bidirectional, batch_first)
    if kind == "lstm":
        return list(torch.ops.aten.lstm.input(input, hidden, params, *options))
    layer = getattr(torch.ops.aten, kind).input
    return list(layer(input, hidden[0], params, *options))


def _forward(kind: str, *args: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        # Contiguous, as the fake form says, and never an alias of an input.
        return [t.clone(memory_format=torch.contiguous_format) for t in _layer(kind, *args)]


def _forward_fake(
    kind: str,
    input: torch.Tensor,
    hidden: list[torch.Tensor],
    params: list[torch.Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[torch.Tensor]:
    width = hidden[0].shape[-1] * (2 if bidirectional else 1)
    output = input.new_empty([*input.shape[:-1], width])
    return [output, *(torch.empty_like(h) for h in hidden)]


def _backward(
    kind: str,
    grads: list[torch.Tensor],
    input: torch.Tensor,
    hidden: list[torch.Tensor],
    params: list[torch.Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    wanted: list[bool],
) -> list[torch.Tensor]:
    everything = [input, *hidden, *params]
    leaves = [t.detach().requires_grad_(want) for t, want in zip(everything, wanted, strict=True)]
    count = len(hidden)
    with recording():
        outputs = _layer(
            kind,
            leaves[0],
            leaves[1 : 1 + count],
            leaves[1 + count :],
            biases,
            layers,
            bidirectional,
            batch_first,
        )
        found = torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], grads)
    return [g.contiguous() for g in found]


def _backward_fake(
    kind: str,
    grads: list[torch.Tensor],
    input: torch.Tensor,
    hidden: list[torch.Tensor],
    params: list[torch.Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    wanted: list[bool],
) -> list[torch.Tensor]:
    everything = [input, *hidden, *params]
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, want in zip(everything, wanted, strict=True)
        if want
    ]


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    kind, given, hidden, params, *options = inputs
    everything = [given, *hidden, *params]
    ctx.save_for_backward(*everything)
    ctx.kind, ctx.options, ctx.count = kind, options, len(hidden)
    ctx.wanted = [t.requires_grad for t in everything]


def _autograd(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    given, *rest = ctx.saved_tensors
    hidden, params = list(rest[: ctx.count]), list(rest[ctx.count :])
    found = iter(
        torch.ops.raypar.recurrent_backward(
            ctx.kind, list(grads), given, hidden, params, *ctx.options, ctx.wanted
        )
    )
    every = [next(found) if want else None for want in ctx.wanted]
    rest_of_options = (None,) * len(ctx.options)
    count = ctx.count
    return (None, every[0], every[1 : 1 + count], every[1 + count :], *rest_of_options)


_LIBRARY.impl("recurrent", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrent_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("raypar::recurrent", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("raypar::recurrent_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "raypar::recurrent", _autograd, setup_context=_context, lib=_LIBRARY
)
