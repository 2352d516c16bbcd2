"""Which optimizers can be run on one rank's own parameters.

Every rank builds its own optimizer from the parameters, or parts of them, that it holds. So an
element-wise rule (SGD, Adam, ...) gives what it gives on the unsplit model; one that looks at whole
tensors (Adafactor, Muon) does where the plan cuts none; one that looks at all parameters at once,
or calls the model again, does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from raypar.errors import OptimizerError
from raypar.stages.optimizers import check_cut
from raypar.stages.spec import OptimizerFn, RankSpec

_REFUSED = {
    "LBFGS": "it evaluates the model several times in a step and mixes all parameters of the model "
    "in one line search, which no rank has; use AdamW, Adam or SGD",
    "SparseAdam": "it needs sparse gradients, and raypar's gradients are dense; use Adam, and "
    "Embedding(sparse=False)",
}


def check_optimizer(
    optimizer: Any, parameters: Iterable[tuple[tuple[int, ...], torch.dtype, bool]]
) -> OptimizerFn:
    """Builds `optimizer` once, on empty tensors of the model's shapes, to see what it is.

    Args:
        optimizer: A callable from parameters to an optimizer, such as
            ``lambda params: torch.optim.AdamW(params, lr=3e-4)``, or an optimizer class.
        parameters: Shape, dtype and whether it requires a gradient, of each of the model's
            parameters.

    Returns:
        `optimizer` itself.

    Raises:
        OptimizerError: It is no such callable, raises, or makes something that cannot be run on
            one rank's parameters.
    """
    example = "for example lambda params: torch.optim.AdamW(params, lr=3e-4)"
    if isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"optimizer is a built {type(optimizer).__name__}; every rank needs its own: pass a "
            f"callable that builds it from parameters, {example}"
        )
    if not callable(optimizer):
        raise OptimizerError(
            f"optimizer is {optimizer!r}; pass a callable that builds a torch.optim.Optimizer from "
            f"parameters, {example}"
        )
    refused = getattr(optimizer, "__name__", "")
    if refused in _REFUSED and getattr(optimizer, "__module__", "").startswith("torch.optim"):
        raise _refused(refused)
    built = _build_empty(optimizer, parameters)
    for kind in type(built).__mro__:
        if kind.__name__ in _REFUSED and kind.__module__.startswith("torch.optim"):
            raise _refused(kind.__name__)
    return optimizer  # type: ignore[no-any-return]


def check_optimizer_on(
    specs: Sequence[RankSpec], parameters: Iterable[tuple[tuple[int, ...], torch.dtype, bool]]
) -> None:
    """Checks, before anything is started, that the optimizer may see the parts that ranks hold.

    Args:
        specs: Every rank's spec; they hold the optimizer.
        parameters: As in `check_optimizer`.

    Raises:
        OptimizerError: It needs parameters whole that the plan cuts.
    """
    built = _build_empty(specs[0].optimizer, parameters)
    for spec in {spec.group: spec for spec in specs}.values():
        check_cut(built, spec.params, spec.axes)


def _build_empty(
    optimizer: OptimizerFn, parameters: Iterable[tuple[tuple[int, ...], torch.dtype, bool]]
) -> torch.optim.Optimizer:
    example = "for example lambda params: torch.optim.AdamW(params, lr=3e-4)"
    empty = [
        torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=grad)
        for shape, dtype, grad in parameters
    ]
    try:
        built = optimizer(empty)
    except Exception as error:
        raise OptimizerError(
            f"the optimizer callable raised {type(error).__name__}: {error}; it is called on every "
            f"rank with the parameters that the rank holds, {example}"
        ) from error
    if not isinstance(built, torch.optim.Optimizer):
        raise OptimizerError(
            f"the optimizer callable returned {type(built).__name__}, not a torch.optim.Optimizer; "
            f"{example}"
        )
    return built


def _refused(name: str) -> OptimizerError:
    return OptimizerError(f"optimizer torch.optim.{name} cannot be used: {_REFUSED[name]}")
