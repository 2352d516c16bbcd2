"""A model captured in eval mode: what is in the graph, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import CaptureError
from raypar.graph.forward import capture_losses, capture_outputs
from raypar.graph.states import Batch, Reduced
from raypar.testing import models


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(self.norm(x)))


BATCH = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
LOSS = nn.functional.cross_entropy


def _names(graph):
    return [op.name for op in graph.ops]


def test_dropout_is_off_batch_norm_runs_on_its_statistics_and_no_buffer_is_written():
    graph = rp.capture(_Net, BATCH, LOSS)
    assert graph.feels_microbatches
    found = capture_losses(graph, BATCH)
    assert "batch_norm" in _names(found)
    assert not found.clean.updates
    assert not {"mul", "seeded_mask", "detach"} & set(_names(found))
    assert found.analysis.exact
    assert all(m.training for m in graph.model.modules())


def test_modules_that_were_in_eval_mode_stay_in_it():
    def make():
        net = _Net()
        net.norm.eval()
        return net

    graph = rp.capture(make, BATCH, LOSS)
    capture_losses(graph, BATCH)
    assert not graph.model.norm.training
    assert graph.model.drop.training


def test_the_loss_of_labels_is_a_mean_over_a_count_that_is_found():
    graph = rp.capture(_Net, BATCH, LOSS)
    count = capture_losses(graph, BATCH).count_of_loss()
    assert count is not None
    case = models.case("mlp")
    batch = case.batch()
    plain = rp.capture(case.model_fn, batch, lambda y, t: (y * y).mean(), case.batch_dims)
    assert capture_losses(plain, batch).count_of_loss() is None


def test_outputs_have_a_row_for_each_sample_and_need_no_targets():
    graph = rp.capture(_Net, BATCH, LOSS)
    found = capture_outputs(graph, BATCH[0])
    assert found.analysis.results == (Batch(0),)
    assert found.analysis.exact
    assert "cross_entropy_loss" not in _names(found)


def test_metrics_are_numbers_beside_the_loss():
    graph = rp.capture(_Net, BATCH, LOSS)
    hits = {"hits": lambda y, batch: (y.argmax(-1) == batch[1]).sum()}
    found = capture_losses(graph, BATCH, hits)
    assert found.names == ("loss", "hits")
    assert isinstance(found.analysis.results[1], Reduced)
    for wrong, text in (
        (lambda y, batch: y, "'bad' returned a tensor of shape"),
        (lambda y, batch: 0.5, "'bad' returned float"),
        (lambda y, batch: torch.tensor(float(y.sum())), "asks for a tensor's value"),
    ):
        with pytest.raises(CaptureError, match=text):
            capture_losses(graph, BATCH, {"bad": wrong})


class _Merging(nn.Module):
    """Adds a low-rank part to its weight in eval mode, as some adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.low = nn.Linear(4, 3), nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return self.layer(x) if not self.training else self.layer(x) + x @ self.low.T

    def train(self, mode: bool = True):
        if self.training != mode:
            with torch.no_grad():
                self.layer.weight += -self.low if mode else self.low
        return super().train(mode)


class _Growing(_Net):
    def train(self, mode: bool = True):
        if not mode:
            self.extra = nn.Linear(2, 2)
        return super().train(mode)


@pytest.mark.parametrize(("model", "text"), [(_Merging, "new values"), (_Growing, "'extra.bias'")])
def test_a_model_with_other_parameters_in_eval_mode_is_refused(model, text):
    graph = rp.capture(model, BATCH, LOSS)
    with pytest.raises(CaptureError, match=text):
        capture_losses(graph, BATCH)


def test_an_output_that_is_no_tensor_says_how_to_choose():
    case = models.case("autoencoder")
    batch = case.batch()
    graph = rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    with pytest.raises(CaptureError, match="select=lambda output"):
        capture_outputs(graph, batch)
    assert capture_outputs(graph, batch, select=lambda output: output.code).analysis.exact
