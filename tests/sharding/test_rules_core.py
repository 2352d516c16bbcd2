"""The property of every core rule, on one call for each way that the op is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import raypar.graph.randomops  # noqa: F401  (registers raypar::apply_mask)
from raypar.sharding.local_call import local_graph
from raypar.sharding.rules.base import OpView
from raypar.sharding.strategies import strategies
from raypar.testing.mesh_threads import ThreadMesh, distribute
from raypar.testing.rules import OpCall, check_rule, interpret

aten = torch.ops.aten
MESHES = ((2,), (2, 2))


def x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(n << i for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ids(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


def ignoring(target: torch.Tensor, value: int = -100) -> torch.Tensor:
    result = target.clone()
    result[1] = value
    return result


SDPA = aten.scaled_dot_product_attention.default
CE = aten.cross_entropy_loss.default
NLL = aten.nll_loss_nd.default

# name: (target, args, options of check_rule, strategies on an axis of 2 that must be offered)
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], list[str]]] = {
    "linear": (
        aten.linear.default,
        (x(4, 6, 12), x(8, 12), x(8)),
        {"blocks": {2: (2,)}},
        ["S1 Rg Rg > S1", "Rg S0 S0 > S2", "Rg S0/2 S0/2 > S2/2", "S2 S1 P > P"],
    ),
    "linear_vector": (aten.linear.default, (x(4, 12), x(12)), {}, ["S1 S0 > P"]),
    "addmm": (
        aten.addmm.default,
        (x(6), x(4, 12), x(12, 6)),
        {"kwargs": {"beta": 0.5, "alpha": 2.0}},
        ["S0 Rg S1 > S1", "P S1 S0 > P"],
    ),
    "baddbmm": (aten.baddbmm.default, (x(1, 4, 6), x(6, 4, 2), x(6, 2, 6)), {}, ["Rg S0 S0 > S0"]),
    "mul": (aten.mul.Tensor, (x(4, 6), x(6)), {}, ["P Rg > P", "Rg P > P", "S0 Rg > S0"]),
    "div": (aten.div.Tensor, (x(4, 6), x(6).exp()), {}, ["P Rg > P"]),
    "add": (aten.add.Tensor, (x(4, 6), x(6)), {"kwargs": {"alpha": 2}}, ["P P > P"]),
    "gelu": (aten.gelu.default, (x(4, 6),), {"blocks": {1: (3,)}}, ["S0 > S0", "S1 > S1"]),
    "where": (aten.where.self, (x(4, 6) > 0, x(4, 6), x(6)), {}, ["R P P > P", "S0 S0 Rg > S0"]),
    "masked_fill": (aten.masked_fill.Scalar, (x(4, 6), x(4, 6) > 0, 0.0), {}, ["P R > P"]),
    "masked_fill_one": (aten.masked_fill.Scalar, (x(4, 6), x(4, 6) > 0, 1.0), {}, ["S0 S0 > S0"]),
    "clamp": (aten.clamp.default, (x(4, 6), -1, 1), {}, ["S0 > S0"]),
    "pow": (aten.pow.Tensor_Scalar, (x(4, 6), 2), {}, ["S1 > S1"]),
    "lerp": (aten.lerp.Tensor, (x(4, 6), x(6), x(4, 6)), {}, ["S0 Rg S0 > S0"]),
    "to": (aten.to.dtype, (x(4, 6), torch.float64), {}, ["P > P"]),
    "to_less": (aten.to.dtype, (x(4, 6), torch.float32), {}, ["S0 > S0"]),
    "prelu": (aten.prelu.default, (x(4, 6), x(6)), {}, ["S1 S0 > S1"]),
    "glu": (aten.glu.default, (x(4, 8),), {}, ["S1/2 > S1"]),
    "zeros_like": (aten.zeros_like.default, (x(4, 8),), {}, ["S0 > S0"]),
    "apply_mask": (
        torch.ops.raypar.apply_mask.default,
        (x(4, 6), (x(4, 1) > 0).double(), 2.0),
        {"fixed": [1]},
        ["S0 S0 > S0", "P Rg > P"],
    ),
    "fused_heads": (
        aten.reshape.default,
        (x(2, 4, 24), [2, 4, 3, 4, 2]),
        {},
        ["S2/3 > S3", "S1 > S1", "P > P"],
    ),
    "fold": (aten.reshape.default, (x(2, 4, 6), [8, 6]), {}, ["S1 > S0/2", "S0 > S0"]),
    "flatten": (aten.flatten.using_ints, (x(2, 4, 4), 1, 2), {}, ["S1 > S1"]),
    "unflatten": (aten.unflatten.int, (x(2, 8), 1, [2, 4]), {}, ["S1 > S1", "S1/2 > S2"]),
    "view_as": (aten.view_as.default, (x(2, 8), x(4, 4)), {}, ["S0 R > S0"]),
    "expand": (aten.expand.default, (x(4, 1), [2, -1, 6]), {}, ["S0 > S1", "P > P"]),
    "repeat": (aten.repeat.default, (x(4, 1), [2, 1, 6]), {}, ["S0 > S1"]),
    "repeat_kv": (aten.repeat_interleave.self_int, (x(4, 4, 2), 3, 1), {}, ["S1 > S1"]),
    "permute": (aten.permute.default, (x(2, 4, 6), [2, 0, 1]), {}, ["S2 > S0"]),
    "transpose": (aten.transpose.int, (x(2, 4, 6), 1, -1), {}, ["S2 > S1"]),
    "movedim": (aten.movedim.int, (x(2, 4, 6), 0, -1), {}, ["S0 > S2"]),
    "chunk": (aten.chunk.default, (x(4, 12), 3, 1), {}, ["S1/3 > S1 S1 S1", "P > P P P"]),
    "split": (aten.split.Tensor, (x(4, 12), 6, 1), {"blocks": {1: (3,)}}, ["S1/6 > S1/3 S1/3"]),
    "split_uneven": (aten.split_with_sizes.default, (x(4, 12), [4, 8], 1), {}, ["S0 > S0 S0"]),
    "split_even": (aten.split_with_sizes.default, (x(4, 12), [6, 6], 1), {}, ["S1/2 > S1 S1"]),
    "unbind": (aten.unbind.int, (x(2, 4, 6), 0), {}, ["S1 > S0 S0"]),
    "select": (aten.select.int, (x(2, 4, 6), 1, 2), {}, ["S2 > S1"]),
    "slice_block": (aten.slice.Tensor, (x(2, 12), 1, 4, 8), {}, ["S1/3 > S1"]),
    "slice_all": (aten.slice.Tensor, (x(2, 12), 1, 0, 2**63 - 1), {}, ["S1 > S1"]),
    "slice_end": (aten.slice.Tensor, (x(2, 12), 1, -4, 2**63 - 1), {}, ["S1/3 > S1"]),
    "slice_step": (aten.slice.Tensor, (x(2, 12), 1, 0, 8, 2), {}, ["S0 > S0"]),
    "cat": (aten.cat.default, ([x(4, 6), x(4, 6)], 1), {}, ["S1 S1 > S1/2", "P P > P"]),
    "cat_uneven": (aten.cat.default, ([x(4, 6), x(4, 2)], -1), {}, ["S0 S0 > S0"]),
    "stack": (aten.stack.default, ([x(4, 6), x(4, 6)], 1), {}, ["S1 S1 > S2"]),
    "sum": (aten.sum.dim_IntList, (x(4, 6), [1], True), {}, ["S1 > P", "S0 > S0", "P > P"]),
    "sum_bool": (aten.sum.default, (x(4, 6) > 0,), {}, ["S0 > P"]),
    "mean": (aten.mean.dim, (x(4, 6, 2), [0, 1]), {}, ["S0 > P", "S2 > S0"]),
    "mean_all": (aten.mean.default, (x(4, 6),), {}, ["S1 > P"]),
    "amax": (aten.amax.default, (x(4, 6), [1]), {}, ["S0 > S0"]),
    "max": (aten.max.dim, (x(4, 6), 1), {}, ["S0 > S0 S0"]),
    "maximum": (aten.max.other, (x(4, 6), x(6)), {}, ["S0 Rg > S0"]),
    "var": (aten.var.correction, (x(4, 6), [1]), {}, ["S0 > S0"]),
    "norm": (aten.linalg_vector_norm.default, (x(4, 6), 2, [1], True), {}, ["S0 > S0"]),
    "softmax": (aten.softmax.int, (x(2, 4, 6), -1), {}, ["S1 > S1", "S2 > S2"]),
    "log_softmax": (aten.log_softmax.int, (x(2, 4, 6), 1), {}, ["S1 > S1"]),
    "layer_norm": (
        aten.layer_norm.default,
        (x(2, 4, 6), [6], x(6), x(6)),
        {},
        ["S1 Rg Rg > S1"],
    ),
    "rms_norm": (aten.rms_norm.default, (x(2, 4, 6), [6], x(6)), {}, ["S1 Rg > S1"]),
    "group_norm": (
        aten.group_norm.default,
        (x(2, 8, 4), 4, x(8), x(8)),
        {},
        ["S1 S0 S0 > S1"],
    ),
    "embedding": (
        aten.embedding.default,
        (x(12, 4), ids(12, 2, 6)),
        {},
        ["S0 R > P", "S1 R > S2", "Rg S1 > S1"],
    ),
    "embedding_padding": (aten.embedding.default, (x(12, 4), ids(12, 2, 6), 3), {}, ["S0 R > P"]),
    "embedding_counts": (
        aten.embedding.default,
        (x(12, 4), ids(12, 2, 6), -1, True),
        {},
        ["S1 R > S2"],
    ),
    "attention_causal": (
        SDPA,
        (x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), None, 0.0, True),
        {},
        ["S1 S1 S1 > S1", "S0 S0 S0 > S0"],
    ),
    "attention_queries": (
        SDPA,
        (x(2, 4, 6, 8), x(2, 4, 4, 8), x(2, 4, 4, 8), x(1, 1, 6, 4)),
        {},
        ["S2 Rg Rg S2 > S2", "S1 S1 S1 Rg > S1"],
    ),
    "attention_grouped": (
        SDPA,
        (x(2, 8, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), None, 0.0, True),
        {"kwargs": {"enable_gqa": True}},
        ["S1 S1 S1 > S1"],
    ),
    "attention_one_key_head": (
        SDPA,
        (x(2, 4, 6, 8), x(2, 1, 6, 8), x(2, 1, 6, 8), None, 0.0, True),
        {"kwargs": {"enable_gqa": True}},
        ["S1 Rg Rg > S1"],
    ),
    "cross_entropy": (
        CE,
        (x(6, 12), ignoring(ids(12, 6)), None, 2),
        {},
        ["S0 S0 > P", "S1 R > R"],
    ),
    "cross_entropy_weighted": (
        CE,
        (x(6, 12), ignoring(ids(12, 6)), x(12).exp(), 2, -100, 0.1),
        {"fixed": [2]},
        ["S1 R S0 > R"],
    ),
    "cross_entropy_smooth": (
        CE,
        (x(6, 12), ignoring(ids(12, 6), 3), None, 0, 3, 0.1),
        {},
        ["S1 R > R", "S0 S0 > S0"],
    ),
    "cross_entropy_image": (
        CE,
        (x(2, 4, 6), ids(4, 2, 6), None, 2),
        {},
        ["S2 S1 > P", "S1 R > R"],
    ),
    "cross_entropy_probabilities": (
        CE,
        (x(6, 4), x(6, 4).softmax(1), None, 1),
        {},
        ["S0 S0 > P"],
    ),
    "cross_entropy_one": (CE, (x(12), ids(12), None, 2), {}, ["S0 R > R"]),
    "nll": (NLL, (x(6, 12), ignoring(ids(12, 6)), None, 2), {}, ["S1 R > R", "S0 S0 > P"]),
    "nll_weighted": (
        NLL,
        (x(6, 12), ignoring(ids(12, 6)), x(12), 0),
        {"fixed": [2]},
        ["S1 R S0 > R"],
    ),
    "inner": (aten.inner.default, (x(4, 6), x(2, 6)), {}, ["S1 S1 > P", "Rg S0 > S1"]),
    "diagonal": (aten.diagonal.default, (x(4, 6, 6), 0, 1, 2), {}, ["S0 > S0", "P > P"]),
    "unfold": (aten.unfold.default, (x(4, 6), 1, 3, 1), {}, ["S0 > S0"]),
    "complex": (aten.view_as_complex.default, (x(4, 6, 2),), {}, ["S1 > S1", "P > P"]),
    "rotate": (
        aten.mul.Tensor,
        (torch.view_as_complex(x(4, 6, 2)), torch.view_as_complex(x(6, 2))),
        {},
        ["S0 Rg > S0", "P Rg > P"],
    ),
    "real": (aten.view_as_real.default, (torch.view_as_complex(x(4, 6, 2)),), {}, ["S1 > S1"]),
    "zeros": (aten.zeros.default, ([4, 6],), {"kwargs": {"dtype": torch.float64}}, [" > S1"]),
    "new_zeros": (aten.new_zeros.default, (x(2), [4, 6]), {}, ["R > S0"]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_strategy_is_the_op(name: str) -> None:
    target, args, options, expected = CASES[name]
    checked = check_rule(target, args, meshes=MESHES, **options)
    missing = [text for text in expected if text not in checked]
    assert not missing, checked


UNARY = """
abs acos asin atan celu ceil cos cosh deg2rad digamma elu erf exp expm1 floor frac gelu hardsigmoid
hardswish hardtanh isfinite leaky_relu lgamma log log1p log_sigmoid logit mish neg rad2deg
reciprocal relu relu6 round rsqrt selu sgn sigmoid sign silu sin sinc sinh softplus softshrink
sqrt square tan tanh trunc clone detach contiguous
""".split()


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_element(name: str) -> None:
    checked = check_rule(getattr(aten, name).default, (x(4, 2).sigmoid(),), meshes=[(2,)])
    linear = name in ("neg", "clone", "detach", "contiguous")
    assert checked == ["R > R", "S0 > S0", "S1 > S1"] + ["P > P"] * linear


def test_a_padded_vocabulary_may_fill_a_whole_part() -> None:
    logits = x(6, 12)
    logits[:, 5:] = -torch.inf  # the last of two parts holds padding alone
    assert "S1 R > R" in check_rule(CE, (logits, ids(5, 6), None, 2), meshes=[(2,)])
    assert "S1 > S1" in check_rule(aten.softmax.int, (logits, -1), meshes=[(2,)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_cut_vocabulary_in_low_precision_rounds_as_the_whole_one(
    dtype: torch.dtype, smoothing: float
) -> None:
    logits, target, mesh = 8 * x(64, 256), ids(256, 64), ThreadMesh([("a", 4)])
    call = OpCall(CE, (logits.to(dtype), target, None, 2, -100, smoothing))
    strategy = next(s for s in strategies(call.node, (4,)) if str(s) == "S1 R > R")
    graph = local_graph(OpView(call.node), strategy, [("a", 4)])
    copies = [n for n in graph.nodes if "to.dtype" in str(n.target)]
    assert all(tuple(n.meta["val"].shape) != (64, 64) for n in copies)  # no wide copy of the logits
    parts = distribute(call.tensors[0], strategy.inputs[0], mesh, torch.Generator())

    def gradient(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        mine = parts[rank].clone().requires_grad_()
        (loss,) = interpret(graph, [mine, target])
        loss.backward()
        assert mine.grad is not None
        return loss.detach(), mine.grad

    found = mesh.run(gradient)
    exact = logits.to(dtype).double().requires_grad_()
    wanted = CE(exact, target, None, 2, -100, smoothing)
    wanted.backward()
    assert exact.grad is not None
    eps = torch.finfo(dtype).eps
    for loss, _ in found:
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=eps, atol=0.0)
    whole = torch.cat([g for _, g in found], 1)
    torch.testing.assert_close(whole.double(), exact.grad, rtol=eps, atol=1e-6)


def test_a_mean_over_a_count_is_not_cut() -> None:
    checked = check_rule(CE, (x(6, 12), ids(12, 6), None, 1), meshes=[(2,)])
    assert checked == ["R R > R"]


def test_rows_are_not_cut_where_gradients_are_divided_by_counts() -> None:
    args = (x(12, 4), ids(12, 2, 6), -1, True)
    assert "S0 R > P" not in check_rule(aten.embedding.default, args, meshes=[(2,)])


def test_queries_are_not_cut_under_a_causal_mask() -> None:
    args = (x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), None, 0.0, True)
    assert not any(t.startswith("S2") for t in check_rule(SDPA, args, meshes=[(2,)]))


def test_key_heads_that_do_not_divide_are_not_cut() -> None:
    args = (x(2, 6, 4, 2), x(2, 3, 4, 2), x(2, 3, 4, 2))
    checked = check_rule(SDPA, args, {"enable_gqa": True}, meshes=[(2,), (3,)])
    assert checked.count("S1 S1 S1 > S1") == 1  # on the axis of three only
