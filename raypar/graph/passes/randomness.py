"""Every random op becomes the seeded op, or is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import raypar.graph.randomops  # noqa: F401  (registers raypar::seeded)
from raypar.errors import CaptureError
from raypar.graph.passes.emit import Emitter, aten, bound_args, is_op, op_name, pick

_REFUSED = frozenset(
    {
        "multinomial",
        "randperm",
        "poisson",
        "rrelu",
        "rrelu_with_noise",
        "binomial",
        "geometric",
        "log_normal",
        "cauchy",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
    }
)
SEEDED = torch.ops.raypar.seeded.default


def seed_random_ops(graph: fx.Graph, rng: fx.Node) -> None:
    """Rewrites random ops to functions of `rng`.

    The sample layout is filled in later, once batch dims are known.

    Raises:
        CaptureError: A random op that has no seeded form; names the source line and the way out.
    """
    for node in list(graph.nodes):
        if not is_op(node):
            continue
        name = op_name(node)
        if name in _REFUSED:
            raise CaptureError(
                f"{node.meta.get('source')}: the random op {name} cannot be reproduced exactly "
                "over a split; use dropout, torch.rand_like, torch.randn_like, torch.bernoulli or "
                "torch.randint, or sample outside the model and pass the result in the batch"
            )
        rewrite = _REWRITES.get(name)
        if rewrite is None:
            continue
        new = rewrite(_Random(graph, node, rng), bound_args(node))
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)


class _Random(Emitter):
    def __init__(self, graph: fx.Graph, node: fx.Node, rng: fx.Node) -> None:
        super().__init__(graph, node)
        self.node = node
        self.rng = rng

    def draw(
        self, kind: str, shape: list[int], dtype: torch.dtype, device: torch.device, p: float = 0.0
    ) -> fx.Node:
        if any(not isinstance(n, int) for n in shape):
            raise CaptureError(
                f"{self.node.meta.get('source')}: random numbers of a data-dependent shape cannot "
                "be reproduced over a split; draw them before the selection"
            )
        return self(SEEDED, self.rng, 0, list(shape), 1, 1, True, kind, p, dtype, device)

    def draw_like(self, kind: str, like: fx.Node, shape: Any = None, p: float = 0.0) -> fx.Node:
        value = like.meta["val"]
        dtype = value.dtype if value.is_floating_point() else torch.float32
        return self.draw(
            kind, list(value.shape if shape is None else shape), dtype, value.device, p
        )

    def mask(self, like: fx.Node, shape: list[int], keep: float) -> fx.Node:
        return self.draw("bernoulli", shape, torch.bool, like.meta["val"].device, keep)


def _dropout(r: _Random, b: dict[str, Any]) -> fx.Node:
    x = pick(b, "input", "self")
    value = x.meta["val"]
    return _masked(r, b, x, list(value.shape))


def _feature_dropout(r: _Random, b: dict[str, Any]) -> fx.Node:
    x = pick(b, "input", "self")
    shape = list(x.meta["val"].shape)
    return _masked(r, b, x, shape[:2] + [1] * (len(shape) - 2))


def _masked(r: _Random, b: dict[str, Any], x: fx.Node, shape: list[int]) -> fx.Node:
    p = float(b["p"])
    if not b["train"] or p == 0.0:
        return x
    if p >= 1.0:
        return r(aten.mul.Scalar, x, 0.0)
    return r(torch.ops.raypar.apply_mask.default, x, r.mask(x, shape, 1 - p), 1 / (1 - p))


def _alpha_dropout(r: _Random, b: dict[str, Any], by_feature: bool = False) -> fx.Node:
    x = pick(b, "input", "self")
    p = float(b["p"])
    if not b["train"] or p == 0.0:
        return x
    if p >= 1.0:
        return r(aten.mul.Scalar, x, 0.0)
    # Klambauer et al., Self-Normalizing Neural Networks, 2017, section on alpha dropout.
    alpha = 1.7580993408473766
    scale = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    shape = list(x.meta["val"].shape)
    if by_feature:
        shape = shape[:2] + [1] * (len(shape) - 2)
    mask = r.mask(x, shape, 1 - p)
    kept = r(torch.ops.raypar.apply_mask.default, x, mask, scale)
    dropped = r(aten.to.dtype, r(aten.logical_not.default, mask), x.meta["val"].dtype)
    shift = r(aten.mul.Scalar, dropped, -alpha * scale)
    return r(aten.add.Scalar, r(aten.add.Tensor, kept, shift), alpha * scale * p)


def _attention_dropout(r: _Random, b: dict[str, Any]) -> fx.Node | None:
    if not b["dropout_p"]:
        return None
    q, k, v, mask = b["query"], b["key"], b["value"], b["attn_mask"]
    if b["enable_gqa"]:
        heads = q.meta["val"].shape[-3]
        k = r(aten.repeat_interleave.self_int, k, heads // k.meta["val"].shape[-3], -3)
        v = r(aten.repeat_interleave.self_int, v, heads // v.meta["val"].shape[-3], -3)
    value = q.meta["val"]
    scale = b["scale"] if b["scale"] is not None else 1 / math.sqrt(value.shape[-1])
    scores = r(aten.matmul.default, r(aten.mul.Scalar, q, scale), r(aten.transpose.int, k, -2, -1))
    if b["is_causal"]:
        shape = list(scores.meta["val"].shape[-2:])
        ones = r(aten.ones.default, shape, dtype=torch.bool, device=value.device)
        mask = r(aten.tril.default, ones)
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            mask = r(aten.logical_not.default, mask)
            scores = r(aten.masked_fill.Scalar, scores, mask, float("-inf"))
        else:
            scores = r(aten.add.Tensor, scores, mask)
    weights = r(aten.softmax.int, scores, -1)
    dropped = _masked(
        r, {"p": b["dropout_p"], "train": True}, weights, list(weights.meta["val"].shape)
    )
    return r(aten.matmul.default, dropped, v)


def _like(kind: str) -> Callable[[_Random, dict[str, Any]], fx.Node]:
    def rewrite(r: _Random, b: dict[str, Any]) -> fx.Node:
        node = r.node.meta["val"]
        return r.draw(kind, list(node.shape), node.dtype, node.device)

    return rewrite


def _uniform(r: _Random, b: dict[str, Any]) -> fx.Node:
    low, high = float(b["from"]), float(b["to"])
    draw = r.draw_like("uniform", b["self"])
    return r(aten.add.Scalar, r(aten.mul.Scalar, draw, high - low), low)


def _normal(r: _Random, b: dict[str, Any]) -> fx.Node:
    mean, std = b.get("mean", 0.0), b.get("std", 1.0)
    value = r.node.meta["val"]
    draw = r.draw("normal", list(value.shape), value.dtype, value.device)
    tensor_std, tensor_mean = isinstance(std, fx.Node), isinstance(mean, fx.Node)
    scaled = r(aten.mul.Tensor if tensor_std else aten.mul.Scalar, draw, std)
    return r(aten.add.Tensor if tensor_mean else aten.add.Scalar, scaled, mean)


def _bernoulli(r: _Random, b: dict[str, Any]) -> fx.Node:
    x, p = b["self"], b.get("p")
    value = x.meta["val"]
    if isinstance(p, fx.Node) or p is None:
        probability = x if p is None else p
        draw = r.draw_like("uniform", probability, shape=value.shape)
        hit = r(aten.lt.Tensor, draw, probability)
        return r(aten.to.dtype, hit, value.dtype)
    return r.draw("bernoulli", list(value.shape), value.dtype, value.device, float(p))


def _exponential(r: _Random, b: dict[str, Any]) -> fx.Node:
    draw = r.draw_like("uniform", b["self"])
    return r(aten.mul.Scalar, r(aten.log1p.default, r(aten.neg.default, draw)), -1 / b["lambd"])


def _integers(r: _Random, b: dict[str, Any]) -> fx.Node:
    value = r.node.meta["val"]
    low, high = int(b.get("low") or b.get("from") or 0), b.get("high", b.get("to"))
    if high is None:
        raise CaptureError(
            f"{r.node.meta.get('source')}: random_ without an upper bound cannot be captured; "
            "give both bounds"
        )
    draw = r.draw("uniform", list(value.shape), torch.float64, value.device)
    spread = r(aten.floor.default, r(aten.mul.Scalar, draw, int(high) - low))
    return r(aten.to.dtype, r(aten.add.Scalar, spread, low), value.dtype)


def _recurrent(r: _Random, b: dict[str, Any]) -> None:
    if b["dropout"] and b["train"] and b["num_layers"] > 1:
        raise CaptureError(
            f"{r.node.meta.get('source')}: {op_name(r.node)} with dropout={b['dropout']} draws its "
            "masks inside a fused kernel, which cannot be reproduced over a split; set its dropout "
            "to 0 and stack single-layer modules with nn.Dropout between them"
        )


_REWRITES: dict[str, Callable[[_Random, dict[str, Any]], fx.Node | None]] = {
    "dropout": _dropout,
    "native_dropout": lambda r, b: _refuse_native(r),
    "feature_dropout": _feature_dropout,
    "alpha_dropout": _alpha_dropout,
    "feature_alpha_dropout": lambda r, b: _alpha_dropout(r, b, by_feature=True),
    "scaled_dot_product_attention": _attention_dropout,
    "rand": _like("uniform"),
    "rand_like": _like("uniform"),
    "randn": _like("normal"),
    "randn_like": _like("normal"),
    "uniform": _uniform,
    "normal": _normal,
    "normal_functional": _normal,
    "bernoulli": _bernoulli,
    "exponential": _exponential,
    "randint": _integers,
    "randint_like": _integers,
    "random": _integers,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
}


def _refuse_native(r: _Random) -> fx.Node:
    raise CaptureError(
        f"{r.node.meta.get('source')}: call torch.nn.functional.dropout instead of native_dropout"
    )
