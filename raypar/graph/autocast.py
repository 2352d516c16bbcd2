"""A model and its loss under autocast, as functions that every rank can call again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raypar.compat import pytree
from raypar.errors import CaptureError, ConfigError, did_you_mean

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the precisions that autocast chooses ops for → dtype."""

ModelFn = Callable[[], nn.Module] | nn.Module
LossFn = Callable[..., torch.Tensor]


def under_autocast(
    model_fn: ModelFn, loss_fn: LossFn | None, precision: str
) -> tuple[ModelFn, LossFn | None]:
    """Has a model and its loss run under `torch.autocast`, as a training loop would run them.

    Parameters, gradients and the optimizer stay as they are (float32); which ops run in the lower
    precision is autocast's own choice. Names of parameters and modules do not change.

    Args:
        model_fn: Builds the module, or is one.
        loss_fn: Maps the module's output to the loss, or None where the module does.
        precision: ``bf16`` or ``fp16``; the latter needs loss scaling
            (`raypar.stages.recipe.LossScale`).

    Returns:
        What to capture in their place; picklable where they are.

    Raises:
        ConfigError: Another precision.
    """
    if precision not in AUTOCAST_DTYPES:
        raise ConfigError(
            f"precision is {precision!r}; autocast takes {', '.join(AUTOCAST_DTYPES)}."
            + did_you_mean(precision, AUTOCAST_DTYPES)
        )
    if isinstance(model_fn, nn.Module):
        model: ModelFn = _in_autocast(copy.copy(model_fn), precision)  # the user's stays as it is
    else:
        model = AutocastModel(model_fn, precision)
    return model, None if loss_fn is None else AutocastCall(loss_fn, precision)


class AutocastModel:
    """Builds a model whose forward runs under autocast.

    Args:
        model_fn: Builds the model.
        precision: A key of `AUTOCAST_DTYPES`.
    """

    def __init__(self, model_fn: Callable[[], nn.Module], precision: str) -> None:
        self.model_fn = model_fn
        self.precision = precision

    def __call__(self) -> nn.Module:
        """The model.

        Raises:
            CaptureError: `model_fn` makes no module.
        """
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise CaptureError(
                f"model_fn returned {type(model).__name__}; it must return a torch.nn.Module"
            )
        return _in_autocast(model, self.precision)


class AutocastCall:
    """A function, a module or a bound method that runs under autocast.

    It has the signature of what it calls, by which a loss function says what it wants.

    Args:
        function: What to call.
        precision: A key of `AUTOCAST_DTYPES`.
    """

    def __init__(self, function: Callable[..., Any], precision: str) -> None:
        self._function = function
        self._precision = precision
        self.__wrapped__ = function.forward if isinstance(function, nn.Module) else function
        name = getattr(function, "__name__", type(function).__name__)
        self.__name__ = str(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        device = _device_type((*args, *kwargs.values()))
        with torch.autocast(device, dtype=AUTOCAST_DTYPES[self._precision]):
            return self._function(*args, **kwargs)


def _in_autocast(model: nn.Module, precision: str) -> nn.Module:
    # An attribute of the instance, which a module's call looks up first: a wrapping module would
    # put its own name before those of all parameters.
    model.forward = AutocastCall(model.forward, precision)
    return model


def _device_type(values: Any) -> str:
    """The kind of device that a call's tensors are on; ``cpu`` where there is none, as on meta."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
            return leaf.device.type
    return "cpu"
