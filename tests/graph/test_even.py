"""Graphs that are written for another batch size are those of a capture at that size."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from raypar import capture
from raypar.graph import even as room
from raypar.graph.even import even
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.cluster import Cluster
from raypar.search.simulate import simulate
from raypar.testing import models, random_plan


@pytest.fixture(autouse=True)
def _written_for_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FEW_OPS", 0)


@cache
def _graph(name: str, taken_for: str = "anything") -> OpGraph:
    """A captured model; another one for every use that may not see what others left in it."""
    case = models.case(name)
    return capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


def _strides(value: torch.Tensor) -> list[int]:
    return [step for n, step in zip(value.shape, value.stride(), strict=True) if n > 1]


def _told(node: fx.Node) -> Any:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    like = [(v.shape, _strides(v), v.dtype) for v in values if isinstance(v, torch.Tensor)]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["id"])
    meta = {k: v for k, v in node.meta.items() if k not in ("val", "source", "tensor_meta")}
    return node.op, str(node.target), repr(args), repr(kwargs), like, meta


FIRST = {("gpt_dropout", 1), ("siamese", 2), ("vit_drop_path", 4), ("dlrm", 2), ("lstm", 1)}
"""Cases of the first tier: every size, dropout, samples in pairs, tables, a recurrent op."""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.thorough] * ((name, size) not in FIRST))
        for name in (
            "gpt",
            "gpt_dropout",
            "hf_llama",
            "hf_t5",
            "hf_bert",
            "siamese",
            "lstm",
            "dlrm",
            "vit_drop_path",
        )
        for size in (1, 2, 4)
    ],
)
def test_a_written_graph_is_the_captured_one(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _graph(name, "written")
    expected = [_told(node) for node in _graph(name, "captured").local(size).graph.nodes]
    mine = even(graph)
    assert mine is not graph
    with monkeypatch.context() as patch:  # written, not captured
        patch.setattr(type(graph), "_build", None)
        found = mine.local(size)
    assert found.loss.meta["id"] == graph.clean.loss.meta["id"]
    told = [_told(node) for node in found.graph.nodes]
    for one, other in zip(told, expected, strict=True):
        assert one == other


def test_a_plan_is_simulated_alike_on_it() -> None:
    graph, cluster = _graph("gpt"), Cluster.virtual(2, 4, "A100-80")
    for seed in range(3):
        plan = random_plan(graph, cluster, seed=seed)
        written = simulate(graph, plan, cluster, lowered=lower_plan(even(graph), plan))
        captured = simulate(graph, plan, cluster, lowered=lower_plan(graph, plan))
        assert (written.step_s, written.peak_bytes) == (captured.step_s, captured.peak_bytes)


class _Thirds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.mix(x) + x.new_ones(x.shape[0] // 3).sum()).square().mean()


def test_what_does_not_grow_evenly_is_captured() -> None:
    graph = capture(_Thirds, torch.zeros(8, 4))
    assert str(even(graph).at(2).graph) == str(graph.at(2).graph)


def test_where_samples_meet_the_model_is_captured() -> None:
    graph = _graph("cnn")
    assert graph.feels_microbatches
    assert even(graph) is graph
