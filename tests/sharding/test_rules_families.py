"""Models of the zoo with a sharding that people would ask for: what is sent, what is held."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

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
from tests.sharding.one_op import real

Wish = Callable[[fx.Node, Strategy], bool]


@cache
def _captured(name: str) -> OpGraph:
    case = models.case(name)
    return rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


def _values(name: str) -> dict[str, torch.Tensor]:
    case = models.case(name)
    return _values_of(case.model_fn(seed=0), models.tensors(case.batch(seed=0)))


def _values_of(model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    values = {f"param:{n}": p.detach() for n, p in model.named_parameters()}
    values |= {f"buffer:{n}": b for n, b in model.named_buffers()}
    values |= {f"in:{i}": t for i, t in enumerate(batch)}
    return values | {"rng": torch.tensor([7, 3, 0])}


def _sharded(name: str, wish: Wish, size: int = 2) -> Lowered:
    """Lowers a model of the zoo; see `_lowered`."""
    return _lowered(_captured(name), _values(name), wish, size)


def _lowered(graph: OpGraph, values: dict[str, torch.Tensor], wish: Wish, size: int = 2) -> Lowered:
    """Lowers a model with the first strategy of every op that is wished for, and checks it."""
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


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("lstm_time_first", 1),
        ("gru", 0),
        pytest.param("lstm", 0, marks=pytest.mark.thorough),
    ],
)
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


class GroupedExperts(nn.Module):
    """Experts that take turns over groups of tokens (GShard, Lepikhin et al. 2020, §3.2)."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda *shape: nn.Parameter(real(*shape) * 0.3)  # noqa: E731
        self.gate, self.w1, self.w2 = make(6, 4), make(4, 6, 8), make(4, 8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps tokens ``[groups, tokens, width]`` to a loss; every expert has 3 seats a group."""
        weight, choice = F.softmax(x @ self.gate, dim=-1).max(dim=-1)
        chosen = F.one_hot(choice, 4)
        place = ((chosen.cumsum(dim=1) - chosen) * chosen).sum(dim=-1)
        seat = F.one_hot(place.clamp(max=2), 3) * (place < 3).unsqueeze(-1)
        dispatch = chosen.to(x.dtype).unsqueeze(-1) * seat.to(x.dtype).unsqueeze(-2)
        inside = torch.einsum("gnec,gnd->egcd", dispatch, x)
        hidden = F.gelu(torch.einsum("egcd,edh->egch", inside, self.w1))
        outside = torch.einsum("egch,ehd->egcd", hidden, self.w2)
        mixed = torch.einsum("gnec,egcd->gnd", dispatch * weight[..., None, None], outside)
        return (mixed - x).square().mean()


def _expert_parallel(node: fx.Node, s: Strategy) -> bool:
    """Tokens are cut over groups; experts between the first and the last product over experts."""
    result = (
        node.meta["val"][0] if isinstance(node.meta["val"], (list, tuple)) else node.meta["val"]
    )
    by_expert = result.dim() == 4 and result.shape[0] == 4
    if op_name(node) != "einsum":
        return s.outputs[0] == ShardingSpec((S(0),))
    if node.args[0] == "gnec,gnd->egcd":
        return str(s) == "S0 S0 > S1"
    return str(s) == ("S0 S0 > S0" if by_expert else "S0 S1 > S0")


@pytest.mark.parametrize("size", [2, 4])
def test_experts_are_held_in_parts_and_tokens_go_to_them(size: int) -> None:
    model, x = GroupedExperts(), real(8, 5, 6)
    graph = rp.capture(model, x)
    lowered = _lowered(graph, _values_of(model, [x]), _expert_parallel, size)
    inputs = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    shapes = {n.meta["id"]: tuple(n.meta["val"].shape) for n in inputs}
    assert shapes["param:w1"] == (4 // size, 6, 8)
    assert shapes["param:w2"] == (4 // size, 8, 6)
    exchanged = [u for u in collectives_of(lowered.graph) if u.forward == "all_to_all"]
    assert [u.backward for u in exchanged] == ["all_to_all"] * 2


def test_experts_without_groups() -> None:
    texts = {"S0 S0 > S0"}
    lowered = _sharded("moe_dense", lambda node, s: op_name(node) == "bmm" and str(s) in texts, 4)
    assert {shapes[1][0] for shapes in _local(lowered, "bmm").values()} == {1}
