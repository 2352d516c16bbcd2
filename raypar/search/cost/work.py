"""What one op does, from shapes alone: FLOPs, bytes, and the class of op that says how fast.

Understands ops as they are captured (linear, layer norm, attention whole) and as they run (after
autograd: mm, native_layer_norm_backward, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.graph import costs
from raypar.graph.costs import forward_flops, numel, size_of
from raypar.graph.passes.emit import bound_args, is_op, op_name
from raypar.programs.policy import is_view as is_device_view
from raypar.search.cost.machine import MeshMachine

CHANNEL_BLOCK = 16
"""Convolutions on a CPU work on this many channels at once (one AVX-512 register of float32)."""


class Work(NamedTuple):
    """What one op does on one device.

    Attributes:
        flops: Floating-point operations.
        nbytes: Bytes read and written.
        dtype: What it computes in, as ``float32``.
        matmul: Whether its work grows faster than its data.
        kind: Form of product or class of element-wise op (`raypar.mesh.calibration.DeviceRates`).
        padded: FLOPs where channels come in blocks of `CHANNEL_BLOCK`; 0: the same.
        calls: Small ops that it runs inside, one after the other; 0: it is part of another op.
    """

    flops: float
    nbytes: float
    dtype: str = "float32"
    matmul: bool = False
    kind: str = "plain"
    padded: float = 0.0
    calls: float = 1.0

    def seconds(self, machine: MeshMachine) -> float:
        """How long it takes on the slowest device of a mesh."""
        flops = self.flops if machine.is_gpu else self.padded or self.flops
        return machine.compute_s(flops, self.nbytes, self.dtype, self.matmul, self.kind, self.calls)

    def scaled(self, share: float) -> Work:
        """The same on a share of the data."""
        return self._replace(
            flops=self.flops * share, nbytes=self.nbytes * share, padded=self.padded * share
        )


VIEW = Work(0, 0, kind="view")
"""Moves nothing, and still has to be called."""

_KINDS: dict[str, str] = {
    name: kind
    for kind, names in {
        "view": "detach alias lift_fresh reshape flatten unflatten view_as",
        "copy": "clone contiguous copy _to_copy to cat stack convert constant_pad_nd pad roll flip "
        "repeat tile repeat_interleave slice_backward select_backward slice_scatter tril triu "
        "_unsafe_index as_strided_copy pixel_shuffle unfold_backward",
        "exp": "exp gelu tanh sigmoid silu erf pow log log1p log2 expm1 sin cos softplus elu mish "
        "hardswish atan2 asin acos sinh cosh logsumexp log_sigmoid_forward logaddexp",
        "exp_backward": "gelu_backward silu_backward softplus_backward elu_backward mish_backward "
        "hardswish_backward log_sigmoid_backward",
        "softmax": "softmax _softmax _safe_softmax",
        "log_softmax": "log_softmax _log_softmax cross_entropy_loss",
        "softmax_backward": "_softmax_backward_data _log_softmax_backward_data",
        "norm": "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm "
        "native_group_norm",
        "norm_backward": "native_layer_norm_backward _fused_rms_norm_backward "
        "native_group_norm_backward",
        "batch_norm": "batch_norm native_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _batch_norm_with_update_functional cudnn_batch_norm "
        "instance_norm",
        "batch_norm_backward": "native_batch_norm_backward batch_norm_backward "
        "cudnn_batch_norm_backward",
        "reduce": "sum mean amax amin max min var var_mean std norm linalg_vector_norm any all "
        "prod argmax argmin cumsum cumprod sum_to_size count_nonzero",
        "gather": "embedding index index_select gather take take_along_dim masked_select "
        "grid_sampler_2d _unsafe_masked_index",
        "scatter": "embedding_dense_backward embedding_backward index_put _unsafe_index_put "
        "index_add scatter scatter_add scatter_reduce masked_scatter sort topk "
        "_unsafe_masked_index_put_accumulate",
        "random": "seeded_random seeded_mask rand randn bernoulli uniform normal",
        "pool": "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d "
        "_adaptive_avg_pool2d max_pool1d avg_pool1d upsample_nearest2d upsample_bilinear2d",
        "pool_backward": "max_pool2d_with_indices_backward avg_pool2d_backward "
        "_adaptive_avg_pool2d_backward upsample_nearest2d_backward upsample_bilinear2d_backward",
    }.items()
    for name in names.split()
}


def kind_of(name: str) -> str:
    """The class of an element-wise op or reduction by the op's name."""
    found = _KINDS.get(name)
    if found is None:
        found = "random" if "seeded" in name or "dropout" in name else "plain"
    return found


def is_free(node: fx.Node) -> bool:
    """Whether a call moves no data."""
    return costs.is_view(node) or is_device_view(node)


def first_tensor(node: fx.Node) -> torch.Tensor | None:
    """The fake value of the first tensor result."""
    value = node.meta.get("val")
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, torch.Tensor):
            return item
    return None


def node_work(node: fx.Node) -> Work:
    """What a call does, in itself: for the forward ops of a captured graph, the forward pass."""
    if node.op != "call_function" or not is_op(node):
        return VIEW._replace(kind="none")
    name = op_name(node)
    if is_free(node) or _KINDS.get(name) == "view":
        return VIEW
    out = first_tensor(node)
    dtype = "float32" if out is None else str(out.dtype).removeprefix("torch.")
    nbytes = float(size_of(node.meta.get("val")) + sum(map(_bytes, node.all_input_nodes)))
    if "convolution" in name or name.startswith("conv"):
        if name != "convert":
            return _convolution(node, name, nbytes, dtype)
    elif "scaled_dot_product" in name:
        return _attention(node, name, nbytes, dtype)
    elif name.startswith("recurrent"):
        return _recurrent(node, name, nbytes, dtype)
    elif name in _LAYERS:
        return _captured_layer(node, name, nbytes, dtype)
    elif name == "seeded":
        calls = _SEEDED_CALLS + _SEEDED_CALLS_PER_SAMPLE * _whole(node.args[3])
        return Work(0.0, nbytes, dtype, False, "random", calls=calls)
    elif costs.is_matmul_like(node):
        return Work(forward_flops(node), nbytes, dtype, True, "")
    return Work(float(0 if out is None else numel(out)), *_traffic(node, name, nbytes, dtype))


def _traffic(node: fx.Node, name: str, nbytes: float, dtype: str) -> tuple[float, str, bool, str]:
    kind = kind_of(name)
    if kind == "gather":  # reads as much of the table as it returns
        nbytes = 2.0 * size_of(node.meta.get("val"))
    return nbytes, dtype, False, kind


def _bytes(node: fx.Node) -> int:
    return size_of(node.meta.get("val"))


def _shape(node: Any) -> list[int]:
    return [n if isinstance(n, int) else 1 for n in node.meta["val"].shape]


def _blocked(channels: int) -> float:
    """How much more work a number of channels is where they come in blocks."""
    if channels <= 4:  # first layers have kernels of their own
        return 1.0
    return math.ceil(channels / CHANNEL_BLOCK) * CHANNEL_BLOCK / channels


def _convolution(node: fx.Node, name: str, nbytes: float, dtype: str) -> Work:
    tensors = list(node.all_input_nodes)
    if name == "convolution_backward":
        grad, source, weight = node.args[0], node.args[1], node.args[2]
        wanted = node.args[10]
        times = sum(map(bool, wanted[:2]))  # type: ignore[arg-type,index,misc]
        transposed, groups = bool(node.args[7]), int(node.args[9])  # type: ignore[arg-type]
        large = _shape(source) if transposed else _shape(grad)
        kind = "conv_backward"
    else:
        weight, times, kind = tensors[1], 1, "conv"
        transposed = "transpose" in name or (name == "convolution" and bool(node.args[6]))
        large = _shape(tensors[0]) if transposed else _shape(node)
        groups = _groups(node, name)
    kernel = _shape(weight)
    flops = 2.0 * times * math.prod(large) * math.prod(kernel[1:])
    wide = groups == 1 or kernel[0] // groups >= CHANNEL_BLOCK
    pad = _blocked(kernel[1]) * _blocked(kernel[0] // groups) if wide else 1.0
    return Work(flops, nbytes, dtype, True, kind, flops * pad)


def _groups(node: fx.Node, name: str) -> int:
    if name == "convolution":
        return int(node.args[8])  # type: ignore[arg-type]
    return int(bound_args(node).get("groups", 1))


_FLASH_BLOCK = 256
"""Rows that a fused attention kernel handles at once: a causal mask spares what is beyond them."""


def _attention(node: fx.Node, name: str, nbytes: float, dtype: str) -> Work:
    backward = name.endswith("backward")
    q, k, v = (_shape(a) for a in node.args[1 if backward else 0 :][:3])
    flops = 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    causal = node.kwargs.get("is_causal", False) or any(a is True for a in node.args)
    if causal and ("flash" in name or name == "scaled_dot_product_attention"):
        flops *= min(1.0, (k[-2] + _FLASH_BLOCK) / (2 * k[-2]))
    if backward:  # five products, where forward has two
        return Work(2.5 * flops, nbytes, dtype, True, "attention_backward")
    return Work(flops, nbytes, dtype, True, "attention")


# raypar's random op makes a generator for every sample, in Python: measured in units of the time
# that one small op takes.
_SEEDED_CALLS, _SEEDED_CALLS_PER_SAMPLE = 6.0, 1.5
# A recurrent layer goes step by step: small ops for each (float32 LSTMs are one fused op); its
# backward op runs the layer again under autograd before it goes back through it.
_STEP_CALLS, _FUSED_STEP_CALLS = 4.0, 1.0
RECURRENT_BACKWARD_CALLS, RECURRENT_BACKWARD_FLOPS = 7.0, 3.5
_LAYERS = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 1


def _recurrent(node: fx.Node, name: str, nbytes: float, dtype: str) -> Work:
    """A recurrent layer as it runs (`raypar.programs.recurrent`), or its backward op."""
    backward = name.endswith("backward")
    at = 2 if backward else 1
    shape = _shape(node.args[at])
    weights = [_shape(w) for w in node.args[at + 2]]  # type: ignore[union-attr]
    flops = 2.0 * math.prod(shape[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)
    layers, both_ways, batch_first = node.args[at + 4 : at + 7]
    calls = _step_calls(str(node.args[0]), dtype, shape, layers, both_ways, batch_first)
    if backward:
        flops, calls = flops * RECURRENT_BACKWARD_FLOPS, calls * RECURRENT_BACKWARD_CALLS
    return Work(flops, nbytes, dtype, True, "recurrent", calls=calls)


def _captured_layer(node: fx.Node, name: str, nbytes: float, dtype: str) -> Work:
    """A recurrent layer as it was captured."""
    bound = bound_args(node)
    calls = _step_calls(
        name,
        dtype,
        _shape(bound["input"]) if "input" in bound else [1],
        bound.get("num_layers"),
        bound.get("bidirectional"),
        bound.get("batch_first"),
    )
    return Work(forward_flops(node), nbytes, dtype, True, "recurrent", calls=calls)


def _step_calls(
    layer: str, dtype: str, shape: list[int], layers: object, both_ways: object, batch_first: object
) -> float:
    per_step = _FUSED_STEP_CALLS if layer == "lstm" and dtype == "float32" else _STEP_CALLS
    steps = shape[1 if batch_first and len(shape) > 2 else 0]
    return per_step * _whole(layers) * (2 if both_ways else 1) * steps


BACKWARD_KIND: Mapping[str, str] = {
    "plain": "plain",
    "exp": "exp_backward",
    "softmax": "softmax_backward",
    "log_softmax": "softmax_backward",
    "norm": "norm_backward",
    "batch_norm": "batch_norm_backward",
    "gather": "scatter",
    "scatter": "gather",
    "copy": "copy",
    "reduce": "plain",
    "pool": "pool_backward",
    "random": "plain",
    "conv": "conv_backward",
    "attention": "attention_backward",
    "recurrent": "recurrent",
}
"""Class of a forward op → class of its backward op."""
