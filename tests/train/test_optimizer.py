"""Which optimizers are taken."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from raypar.errors import OptimizerError
from raypar.stages.recipe import Recipe
from raypar.train.optimizer import check_recipe

PARAMETERS = {"first": ((4, 3), "float32", True), "second": ((3, 3), "float64", True)}


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.Adafactor,
        torch.optim.Muon,
    ],
)
def test_these_are_taken(optimizer: Any) -> None:
    check_recipe(optimizer, Recipe(), PARAMETERS)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (torch.optim.LBFGS, "torch.optim.LBFGS cannot be used"),
        (lambda p: torch.optim.LBFGS(list(p)), "torch.optim.LBFGS cannot be used"),
        (torch.optim.SparseAdam, "torch.optim.SparseAdam cannot be used.*sparse=False"),
        (lambda p: 3, "returned int, not a torch.optim.Optimizer"),
        ("AdamW", "is 'AdamW'; pass a callable"),
        (partial(torch.optim.SGD, lr=-1), "raised ValueError: Invalid learning rate"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "built SGD; every rank"),
    ],
)
def test_these_are_refused_by_name(optimizer: Any, text: str) -> None:
    with pytest.raises(OptimizerError, match=text):
        check_recipe(optimizer, Recipe(), PARAMETERS)
