"""FLOPs and bytes of one op, from shapes alone; own formulas where torch counts nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from raypar.graph.passes.emit import bound_args, is_op, op_name

_VIEWS = frozenset(
    """view reshape flatten unflatten unsqueeze squeeze permute transpose t expand expand_as slice
    narrow select chunk split split_with_sizes unbind detach alias diagonal movedim view_as
    getitem numpy_T mT swapaxes""".split()
)


def size_of(value: Any) -> int:
    """Bytes of a fake value (tensors in tuples added up); unknown sizes count as one."""
    if isinstance(value, (list, tuple)):
        return sum(size_of(v) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return numel(value) * value.element_size()


def numel(value: torch.Tensor) -> int:
    """Elements of a fake tensor; a data-dependent dim counts as one."""
    return math.prod(n if isinstance(n, int) else 1 for n in value.shape)


def data_dependent(value: Any) -> bool:
    """Whether a fake value, or one of several, has a size that only the data tell."""
    if isinstance(value, (tuple, list)):
        return any(data_dependent(v) for v in value)
    return isinstance(value, torch.Tensor) and not all(isinstance(n, int) for n in value.shape)


def _dims(node: fx.Node) -> list[int]:
    return [n if isinstance(n, int) else 1 for n in node.meta["val"].shape]


def _out(node: fx.Node) -> int:
    value = node.meta["val"]
    return numel(value[0] if isinstance(value, (list, tuple)) else value)


def _linear(node: fx.Node, b: dict[str, Any]) -> int:
    return 2 * _out(node) * _dims(b["input"])[-1]


def _matmul(node: fx.Node, b: dict[str, Any]) -> int:
    return 2 * _out(node) * _dims(b["self"])[-1]


def _addmm(node: fx.Node, b: dict[str, Any]) -> int:
    return 2 * _out(node) * _dims(b["mat1" if "mat1" in b else "batch1"])[-1]


def _conv(node: fx.Node, b: dict[str, Any]) -> int:
    weight = _dims(b["weight"])
    return 2 * _out(node) * math.prod(weight[1:])


def _conv_transpose(node: fx.Node, b: dict[str, Any]) -> int:
    weight = _dims(b["weight"])
    return 2 * math.prod(_dims(b["input"])) * math.prod(weight[1:])


def _attention(node: fx.Node, b: dict[str, Any]) -> int:
    q, k, v = _dims(b["query"]), _dims(b["key"]), _dims(b["value"])
    pairs = math.prod(q[:-1]) * k[-2]
    return 2 * pairs * (q[-1] + v[-1])


def _recurrent(node: fx.Node, b: dict[str, Any]) -> int:
    steps = math.prod(_dims(b["input"])[:-1])
    return sum(2 * steps * math.prod(_dims(w)) for w in b["params"] if len(_dims(w)) == 2)


def _einsum(node: fx.Node, b: dict[str, Any]) -> int:
    sizes: dict[str, int] = {}
    terms = b["equation"].replace(" ", "").split("->")[0].split(",")
    for term, value in zip(terms, b["tensors"], strict=True):
        if "." in term:
            return 2 * _out(node) * _dims(b["tensors"][0])[-1]
        sizes.update(zip(term, _dims(value), strict=True))
    return (2 if len(terms) > 1 else 1) * math.prod(sizes.values())


_FORMULAS: dict[str, Callable[[fx.Node, dict[str, Any]], int]] = {
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "einsum": _einsum,
}


def is_view(node: fx.Node) -> bool:
    """Whether the op moves no data."""
    return node.target is operator.getitem or op_name(node) in _VIEWS


def is_matmul_like(node: fx.Node) -> bool:
    """Whether the op's work grows faster than its data."""
    return is_op(node) and op_name(node) in _FORMULAS


def forward_flops(node: fx.Node) -> int:
    """Forward floating-point operations of one op; one per output element where element-wise."""
    if not is_op(node) or is_view(node):
        return 0
    formula = _FORMULAS.get(op_name(node))
    if formula is not None:
        return formula(node, bound_args(node))
    value = node.meta.get("val")
    return _out(node) if isinstance(value, (torch.Tensor, list, tuple)) and value is not None else 0


def forward_bytes(node: fx.Node) -> int:
    """Bytes read and written by one op; 0 for views."""
    if not is_op(node) or is_view(node):
        return 0
    return size_of(node.meta.get("val")) + sum(
        size_of(i.meta.get("val")) for i in node.all_input_nodes
    )
