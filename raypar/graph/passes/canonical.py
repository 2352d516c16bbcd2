"""Canonical forms.

Batch norm has explicit running statistics, cross-entropy is a sum over a count, and a view is a
reshape: whether memory happens to be contiguous differs between batch sizes and on either side of
a cut, and must not change which ops there are.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from raypar.errors import CaptureError
from raypar.graph.passes.emit import Emitter, aten, bound_args, is_op, op_name

_MEAN, _SUM = 1, 2


def canonicalize(graph: fx.Graph) -> None:
    """Rewrites what hides a state change or a batch-wide count inside one op."""
    for node in list(graph.nodes):
        if not is_op(node):
            continue
        name = op_name(node)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif name == "batch_norm":
            _batch_norm(graph, node)
        elif name in ("embedding", "embedding_bag"):
            _refuse_sparse(node)
        elif name == "instance_norm":
            _instance_norm(node)
        elif name in ("index", "masked_select"):
            _masked_total(graph, node)
        elif name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"):
            _mean_over_count(graph, node)


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    b = bound_args(node)
    if not b["training"]:
        return
    emit = Emitter(graph, node)
    mean, var = b["running_mean"], b["running_var"]
    if mean is None:
        value = b["input"].meta["val"]
        kwargs = {"dtype": value.dtype, "device": value.device}
        channels = [value.shape[1]]
        result = emit(
            aten._native_batch_norm_legit_functional.default,
            b["input"],
            b["weight"],
            b["bias"],
            emit(aten.zeros.default, channels, **kwargs),
            emit(aten.ones.default, channels, **kwargs),
            True,
            b["momentum"],
            b["eps"],
        )
        _replace(graph, node, emit(operator.getitem, result, 0, like=node.meta["val"]))
        return
    args = (b["input"], b["weight"], b["bias"], mean, var, True, b["momentum"], b["eps"])
    result = emit(aten._native_batch_norm_legit_functional.default, *args)
    values = result.meta["val"]
    for buffer, index in ((mean, 3), (var, 4)):
        new = emit(operator.getitem, result, index, like=values[index])
        # A plain write; the functionalize pass, which runs next, turns it into an update.
        emit(aten.copy_.default, buffer, new, like=buffer.meta["val"])
    _replace(graph, node, emit(operator.getitem, result, 0, like=values[0]))


def _instance_norm(node: fx.Node) -> None:
    b = bound_args(node)
    if b["use_input_stats"] and b["running_mean"] is not None:
        raise CaptureError(
            f"{node.meta.get('source')}: instance_norm with running statistics in training is not "
            "supported; set track_running_stats=False"
        )


def _refuse_sparse(node: fx.Node) -> None:
    if bound_args(node).get("sparse"):
        raise CaptureError(
            f"{node.meta.get('source')}: {op_name(node)} with sparse=True makes sparse gradients, "
            "which cannot be summed over microbatches and replicas here; set sparse=False"
        )


def _masked_total(graph: fx.Graph, node: fx.Node) -> None:
    """``x[mask].mean()`` and ``x[mask].sum()`` without a size that depends on the data."""
    b = bound_args(node)
    masks = b["indices"] if "indices" in b else [b["mask"]]
    users = list(node.users)
    if len(masks) != 1 or masks[0] is None or masks[0].meta["val"].dtype != torch.bool:
        return
    totals = (aten.mean.default, aten.sum.default)
    if not users or any(
        u.target not in totals or u.kwargs or not node.meta["val"].is_floating_point()
        for u in users
    ):
        return
    value, mask = b["self"], masks[0]
    shape, width = list(value.meta["val"].shape), mask.meta["val"].dim()
    if list(mask.meta["val"].shape) != shape[:width]:
        return
    emit = Emitter(graph, node)
    wide = mask
    if len(shape) > width:
        wide = emit(aten.reshape.default, mask, shape[:width] + [1] * (len(shape) - width))
    zero = emit(
        aten.zeros.default, [], dtype=value.meta["val"].dtype, device=value.meta["val"].device
    )
    total = emit(aten.sum.default, emit(aten.where.self, wide, value, zero))
    count = emit(aten.to.dtype, emit(aten.sum.default, mask), value.meta["val"].dtype)
    if len(shape) > width:
        count = emit(aten.mul.Tensor, count, math.prod(shape[width:]))
    for user in users:
        if user.target is aten.sum.default:
            _replace(graph, user, total)
        else:
            _replace(graph, user, emit(aten.div.Tensor, total, count))
    graph.erase_node(node)


def _mean_over_count(graph: fx.Graph, node: fx.Node) -> None:
    b = bound_args(node)
    target = b["target"]
    if b["reduction"] != _MEAN or target.meta["val"].is_floating_point():
        return
    emit = Emitter(graph, node)
    inputs = b["self"]
    kwargs: dict[str, Any] = {k: v for k, v in b.items() if k not in ("self", "target")}
    kwargs["reduction"] = _SUM
    total = emit(node.target, inputs, target, **kwargs)
    counted = emit(aten.ne.Scalar, target, b["ignore_index"])
    dtype = total.meta["val"].dtype
    if b["weight"] is None:
        count = emit(aten.to.dtype, emit(aten.sum.default, counted), dtype)
    else:
        zeros = emit(aten.zeros_like.default, target)
        safe = emit(aten.where.self, counted, target, zeros)
        weights = emit(aten.index.Tensor, b["weight"], [safe])
        weights = emit(aten.mul.Tensor, weights, counted)
        count = emit(aten.sum.default, weights)
    _replace(graph, node, emit(aten.div.Tensor, total, count))
