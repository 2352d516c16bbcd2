"""Wrong batches to predict from: told before a rank fails on them, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import raypar as rp
from raypar.stages.compile import compile_plan
from raypar.stages.local import LocalRun
from raypar.train.evaluate import Evaluator


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


X, Y = torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)


@pytest.fixture(scope="module")
def predict() -> Iterator[Any]:
    graph = rp.capture(Model, (X, Y), nn.functional.cross_entropy)
    plan = rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(stages=2, microbatches=2))
    specs = compile_plan(graph, plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    evaluator = Evaluator(graph, plan, specs)
    with LocalRun(specs) as run:
        run.start()
        yield lambda batch, **options: list(evaluator.predict(run, [batch], **options))


@pytest.mark.parametrize(
    "batch",
    [X.double(), (X.double(),), (X.long(), Y), [np.zeros((4, 6))]],
    ids=["alone", "tuple", "whole", "numpy"],
)
def test_another_kind_of_numbers_is_told_and_the_run_goes_on(predict: Any, batch: Any) -> None:
    with pytest.raises(rp.DataError, match=r"tensor 0 of a batch .* trains on torch\.float32"):
        predict(batch)
    [output] = predict((X[:3], Y[:3].int()))  # labels are not read: whole numbers are whole numbers
    assert output.shape == (3, 3)


@pytest.mark.parametrize("select", [lambda _: None, lambda _: {"of": 1}])
def test_a_selection_without_a_tensor_is_told(predict: Any, select: Any) -> None:
    with pytest.raises(rp.CaptureError, match="select returned no tensor"):
        predict(X, select=select)
