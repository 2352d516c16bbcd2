"""Which forward values a stage recomputes instead of saving."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from raypar.graph.costs import size_of
from raypar.graph.passes.emit import is_op, op_name

Predicate = Callable[[fx.Node], bool]

# Device-level ops (after autograd) whose work grows faster than their data, or that are too
# irregular to run twice for the memory they save.
_HEAVY = frozenset(
    """mm bmm addmm baddbmm addbmm addmv mv dot convolution _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention mkldnn_rnn_layer _cudnn_rnn _thnn_fused_lstm_cell
    mkldnn_linear _trilinear sort topk nonzero _embedding_bag scatter scatter_add index_put
    index_add scatter_reduce cumsum cumprod linalg_svd linalg_eigh linalg_cholesky_ex
    max_pool2d_with_indices max_pool3d_with_indices masked_select grid_sampler_2d
    grid_sampler_3d _fft_r2c _fft_c2r _fft_c2c recurrent""".split()
)
_VIEWS = frozenset(
    """view _unsafe_view t transpose permute expand unsqueeze squeeze slice select split
    split_with_sizes unbind alias detach diagonal as_strided _reshape_alias unfold""".split()
)
# A reduction whose result is this much smaller than its input is kept: it costs nothing to hold.
_SMALL = 8


def is_view(node: fx.Node) -> bool:
    """Whether a device-level op moves no data."""
    return is_op(node) and op_name(node) in _VIEWS


def recomputable(policy: str) -> Predicate:
    """The predicate of a recompute policy: true for values that backward makes anew.

    Views are always made anew: they hold no memory of their own.
    """
    if policy == "full":
        return lambda node: node.op != "placeholder"
    if policy == "selective":
        return _cheap
    return _is_free


def is_parameter_gather(node: fx.Node) -> bool:
    """Whether the node makes a whole parameter of its parts, which is never held (ZeRO-3)."""
    while _is_convert(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        if source.op == "placeholder":
            return str(source.meta.get("id", "")).startswith("param:")
        node = source
    return False


def _is_convert(node: fx.Node) -> bool:
    return is_op(node) and op_name(node) == "convert"


def _is_free(node: fx.Node) -> bool:
    if node.op == "get_attr" or is_parameter_gather(node):
        return True
    source = node.args[0] if node.target is operator.getitem else None
    if isinstance(source, fx.Node):
        return is_view(source)
    return is_view(node)


def _cheap(node: fx.Node) -> bool:
    if node.op == "get_attr" or is_parameter_gather(node):
        return True
    if _is_convert(node):  # a collective is dear, and a part is smaller than what it is a part of
        return False
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or source.op == "placeholder":
        return False
    if not is_op(source):
        return False
    name = op_name(source)
    if name in _HEAVY or torch.Tag.dynamic_output_shape in source.target.tags:  # type: ignore[union-attr]
        return False
    if is_view(source):
        return True
    largest = max((size_of(i.meta.get("val")) for i in source.all_input_nodes), default=0)
    return size_of(source.meta.get("val")) * _SMALL > largest
