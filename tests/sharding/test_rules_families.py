"""Models of the zoo with a sharding that people would ask for: what is sent, what is held."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import fx

import raypar as rp
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import op_name
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.listing import collectives_of
from raypar.sharding.lower import Lowered, held_spec, lower, readings
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import S, ShardingSpec
from raypar.sharding.strategies import strategies, whole
from raypar.testing import models
from tests.sharding.lowering import run_lowered, run_whole

Wish = Callable[[fx.Node, Strategy], bool]


@cache
def _captured(name: str) -> OpGraph:
    case = models.case(name)
    return rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


def _values(name: str) -> dict[str, torch.Tensor]:
    case = models.case(name)
    model = case.model_fn(seed=0)
    values = {f"param:{n}": p.detach() for n, p in model.named_parameters()}
    values |= {f"buffer:{n}": b for n, b in model.named_buffers()}
    values |= {f"in:{i}": t for i, t in enumerate(models.tensors(case.batch(seed=0)))}
    return values | {"rng": torch.tensor([7, 3, 0])}


def _sharded(name: str, wish: Wish, size: int = 2) -> Lowered:
    """Lowers a model with the first strategy of every op that is wished for, and checks it."""
    graph = _captured(name)
    clean = graph.local(graph.global_batch).graph
    annotate_blocks(clean)
    chosen: dict[fx.Node, Strategy] = {}
    for node in clean.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            options = [s for s in strategies(node, (size,))[1:] if wish(node, s)]
            chosen[node] = options[0] if options else whole(node, 1)
    held = {
        key.removeprefix("param:"): held_spec(specs, 1)
        for key, specs in readings(clean, chosen).items()
        if key.startswith("param:")
    }
    axes = (("x", size),)
    values = _values(name)
    wanted = run_whole(clean, values)
    found = run_lowered(clean, chosen, axes, values, held)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-9, atol=1e-9)
    for key, gradient in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-9, atol=1e-9)
    return lower(clean, chosen, axes, held=held)


def _local(lowered: Lowered, *names: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Local shapes of the inputs of some ops, by id."""
    return {
        node.meta["id"]: tuple(tuple(i.meta["val"].shape) for i in node.all_input_nodes)
        for node in lowered.graph.nodes
        if node.op == "call_function" and op_name(node) in names
    }


def _first_result(state: str) -> Wish:
    return lambda node, s: bool(s.outputs) and s.outputs[0] == ShardingSpec((state,))


def _sent(lowered: Lowered) -> set[tuple[str, str]]:
    return {(use.forward, use.backward) for use in collectives_of(lowered.graph)}


@pytest.mark.parametrize("size", [2, 4])
def test_a_residual_network_over_samples(size: int) -> None:
    lowered = _sharded("cnn", _first_result(S(0)), size)
    for x, *_ in _local(lowered, "conv2d", "batch_norm_by").values():
        assert x[0] == 8 // size
    norms = [n for n in lowered.graph.nodes if op_name(n) == "moments"]
    assert len(norms) == 9
    assert ("all_gather", "reduce_scatter") in _sent(lowered)


def test_a_residual_network_over_rows_of_the_image() -> None:
    lowered = _sharded("cnn", _first_result(S(2)))
    stem = next(iter(_local(lowered, "conv2d").values()))
    assert stem[0] == (8, 3, 16 // 2 + 2, 16), "a row of each neighbour around the own rows"
    edges = [u for u in collectives_of(lowered.graph) if u.value.startswith("stem.0/conv2d")]
    assert {(u.forward, u.backward) for u in edges} >= {("all_gather", ""), ("", "all_gather")}


def test_a_residual_network_over_channels() -> None:
    lowered = _sharded("cnn", _first_result(S(1)))
    assert all(w[0] * 2 in (8, 16, 32) for _, w in _local(lowered, "conv2d").values())
    assert not [n for n in lowered.graph.nodes if op_name(n) == "moments"]


def test_a_unet_over_rows_of_the_image() -> None:
    lowered = _sharded("unet", _first_result(S(2)))
    shapes = _local(lowered, "conv_transpose2d", "max_pool2d", "avg_pool2d")
    assert sorted(x[2:] for x, *_ in shapes.values()) == [(2, 4), (4, 8), (8, 16)]


@pytest.mark.parametrize(("name", "dim"), [("lstm", 0), ("lstm_time_first", 1), ("gru", 0)])
def test_recurrent_layers_over_samples(name: str, dim: int) -> None:
    lowered = _sharded(name, lambda node, s: op_name(node) in ("lstm", "gru"), 4)
    (inputs,) = _local(lowered, "lstm", "gru").values()
    assert inputs[0][dim] == 8 // 4
    assert inputs[1][1] == 8 // 4


@pytest.mark.parametrize(
    ("wish", "rows", "columns"), [("S0 R R >", 2, 1), ("S1 R R >", 1, 2), ("Rg S0 S0 >", 1, 1)]
)
def test_tables_of_a_recommender(wish: str, rows: int, columns: int) -> None:
    lowered = _sharded("dlrm", lambda node, s: str(s).startswith(wish) and "bag" in op_name(node))
    tables = sorted(shapes[0] for shapes in _local(lowered, "embedding_bag").values())
    assert tables == [(n // rows, 16 // columns) for n in (30, 50, 70)]
