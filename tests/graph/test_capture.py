"""The zoo captures; ids do not change with the batch; costs, layers, cuts and errors."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import raypar
from raypar.errors import CaptureError, PlanError
from raypar.graph.build import build_graph
from raypar.testing import models
from raypar.testing.plans import random_plan
from tests._tiers import examples

CASES = models.cases(hf=False)
# Models of the ops of others, which are tried.
REPEATED = {
    "gpt_dropout", "gpt_shared_mask", "lstm_time_first", "gru_time_major", "torch_encoder",
    "bert_own", "albert", "vit_drop_path", "two_losses", "autoencoder", "partly_frozen",
}  # fmt: skip
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.thorough] * (case.name in REPEATED))
        for case in CASES
    ],
)


def capture_case(case, **options):
    model_fn = options.pop("model_fn", lambda: case.model_fn(seed=0))
    return raypar.capture(model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


@every_case
def test_ids_are_equal_at_batch_1_2_and_8(case):
    graph = capture_case(case)
    ids = [op.id for op in graph.ops]
    assert len(set(ids)) == len(ids)
    for size in (1, 2, 8)[: examples(1, 3)]:
        again = build_graph(graph._model, graph._loss_of, graph.spec, size)
        assert [n.meta["id"] for n in again.ops] == ids
    assert capture_case(case).hash == graph.hash


@pytest.mark.parametrize("name", ["gpt", "mlp", "unet", "vit"])
def test_flops_are_torchs_where_torch_counts(name):
    case = next(c for c in CASES if c.name == name)
    graph = capture_case(case)
    model = case.model_fn(seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph.loss_of(model, case.batch(seed=0))
    # torch counts nothing for the CPU's fused attention.
    counted = {"linear", "matmul", "bmm", "mm", "addmm", "conv2d", "conv_transpose2d", "einsum"}
    own = sum(op.flops for op in graph.ops if op.name in counted)
    assert own == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_model_too_large_for_any_machine_is_captured_and_planned():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(65536, 65536) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x.mean()

    torch.set_default_dtype(torch.float32)
    graph = raypar.capture(Huge, (torch.zeros(8, 65536),))
    size = sum(4 * torch.Size(shape).numel() for shape, _, _ in graph.params.values())
    assert size > 100e9
    assert random_plan(graph, raypar.Cluster.local(4), seed=3, stages=4).stages


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) + x
        return x.mean()


def test_layers_and_repeated_layers():
    graph = raypar.capture(Repeated, (torch.zeros(8, 6),))
    names = [layer.name for layer in graph.layers]
    assert [n for n in names if n.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [layer.first for layer in graph.layers][1:] == [
        layer.last + 1 for layer in graph.layers
    ][:-1]
    groups = [[names[i] for i in found] for found in graph.repeated.values()]
    assert ["blocks.0", "blocks.1", "blocks.2"] in groups


def test_to_networkx_has_ops_and_values():
    graph = raypar.capture(Repeated, (torch.zeros(8, 6),))
    found = graph.to_networkx()
    assert set(found) == {op.id for op in graph.ops}
    assert nx.is_directed_acyclic_graph(found)
    assert found.edges["first/linear#0", "blocks.0.0/linear#0"]["nbytes"] == 8 * 8 * 8
    assert found.nodes["first/linear#0"]["op"].flops == 2 * 8 * 6 * 8


def test_no_cut_between_the_readers_and_the_writer_of_a_buffer():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x):
            x = x + self.seen
            x = self.layer(x).relu()
            self.seen = self.seen + x.detach().mean(0)
            return x.mean()

    graph = raypar.capture(Counts, (torch.zeros(8, 6),))
    place = {op.id: i for i, op in enumerate(graph.ops)}
    read, written = place["/add#0"], place["/add#1"]
    assert read < written
    assert not [k for k in graph.cuts if read < k <= written]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x)


X = torch.zeros(8, 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Plain, (X,)), "must be one floating-point number"),
        ((lambda: 3, (X,)), "model_fn returned int"),
        ((lambda: 1 / 0, (X,)), "model_fn raised ZeroDivisionError"),
        ((Plain, ()), "no tensor with dims"),
        ((Plain, (X, X, X)), "forward"),
        ((Plain, (torch.zeros(8, 5),), lambda out: out.mean()), "failed while it was captured"),
        ((Plain, (X,), lambda out: out.mean(), (3,)), r"batch_dims\[0\] is 3"),
        ((Plain, (X,), lambda out: out.mean(), (0, 0)), "batch_dims has 2 entries"),
        ((Plain, (X,), lambda out: {"logits": out}), "the loss is dict"),
    ],
)
def test_what_cannot_be_captured(arguments, words):
    with pytest.raises(CaptureError, match=words):
        raypar.capture(*arguments)


def test_a_frozen_model_is_refused():
    def frozen():
        return nn.Sequential(Plain()).requires_grad_(False)

    graph = raypar.capture(frozen, (X,), lambda out: out.mean())
    plan = random_plan(graph, raypar.Cluster.local(2), seed=0, stages=1)
    from raypar.testing.equivalence import run_plan

    with pytest.raises(CaptureError, match="no trainable parameter"):
        run_plan(frozen, (X,), plan, loss_fn=lambda out: out.mean())


def test_more_stages_than_cuts_is_refused():
    graph = raypar.capture(Repeated, (torch.zeros(8, 6),))
    with pytest.raises(PlanError, match="places to cut"):
        random_plan(graph, raypar.Cluster.local(4), stages=len(graph.cuts) + 2)


def test_a_model_that_takes_a_whole_dict_is_told_how_to_get_it() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"out": self.linear(batch["x"])}

    def loss(out: dict[str, torch.Tensor], batch: tuple[dict[str, torch.Tensor]]) -> torch.Tensor:
        found: torch.Tensor = (out["out"] - batch[0]["y"]).square().mean()
        return found

    batch = {"x": torch.randn(8, 4), "y": torch.randn(8, 2)}
    with pytest.raises(CaptureError, match=r"the keyword arguments x, y\. .*a tuple of one dict"):
        raypar.capture(Whole, batch, loss)
    assert raypar.capture(Whole, (batch,), loss).global_batch == 8


def test_a_batch_with_labels_and_no_loss_function_is_told_as_such() -> None:
    batch = (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        raypar.CaptureError, match=r"2 parts, of which Linear.forward.* takes 1"
    ) as found:
        raypar.capture(lambda: nn.Linear(3, 2), batch)
    assert "model.loss" in str(found.value)
    raypar.capture(lambda: nn.Linear(3, 2), batch, nn.functional.cross_entropy)
