"""A model under autocast is the same model, with other dtypes inside."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import CaptureError, ConfigError
from raypar.graph.autocast import under_autocast

BATCH = (torch.ones(4, 3, dtype=torch.float32), torch.tensor([0, 1, 1, 0]))


class Net(nn.Module):
    """Says which dtype its matmul has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float32)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.layer(x) * scale


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output @ torch.eye(2, dtype=torch.float32), target)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_names_signature_and_pickling_stay(precision: str) -> None:
    model_fn, loss_fn = under_autocast(Net, loss, precision)
    assert callable(model_fn)
    again, loss_again = pickle.loads(pickle.dumps((model_fn, loss_fn)))
    model = again()
    assert isinstance(model, Net)
    assert list(model.state_dict()) == list(Net().state_dict())
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    assert inspect.signature(loss_again) == inspect.signature(loss)
    output = model(BATCH[0])
    assert output.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert loss_again(output, BATCH[1]).dtype == torch.float32  # nll_loss is one of autocast's


def test_a_captured_graph_has_the_dtypes_of_eager_autocast() -> None:
    model_fn, loss_fn = under_autocast(Net, loss, "bf16")
    graph = rp.capture(model_fn, BATCH, loss_fn)
    dtypes = {op.name: op.dtypes[0] for op in graph.ops}
    assert dtypes["linear"] == dtypes["matmul"] == "bfloat16"
    assert dtypes["cross_entropy_loss"] == dtypes["div"] == "float32"
    assert {dtype for _, dtype, _ in graph.params.values()} == {"float32"}


def test_a_module_that_is_given_stays_as_it_is() -> None:
    module = Net()
    wrapped, _ = under_autocast(module, None, "bf16")
    assert isinstance(wrapped, Net)
    assert wrapped.layer is module.layer
    assert wrapped(BATCH[0]).dtype == torch.bfloat16
    assert module(BATCH[0]).dtype == torch.float32
    loaded = pickle.loads(pickle.dumps(wrapped))
    assert loaded(BATCH[0]).dtype == torch.bfloat16
    assert torch.equal(loaded.layer.weight, module.layer.weight)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_loss_modules_and_functions(criterion: Any) -> None:
    model_fn, loss_fn = under_autocast(Net, criterion, "bf16")
    graph = rp.capture(model_fn, BATCH, loss_fn)
    assert graph.clean.loss.meta["val"].dtype == torch.float32


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(ConfigError, match=r"precision is 'bf8'; .* Did you mean 'bf16'"):
        under_autocast(Net, None, "bf8")
    model_fn, _ = under_autocast(lambda: 3, None, "bf16")  # type: ignore[arg-type, return-value]
    with pytest.raises(CaptureError, match="model_fn returned int"):
        rp.capture(model_fn, BATCH)
