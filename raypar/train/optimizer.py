"""Which optimizers can be run on one rank's own parameters.

Every rank builds its own optimizer from the parameters, or parts of them, that it holds. So an
element-wise rule (SGD, Adam, ...) gives what it gives on the unsplit model; one that looks at whole
tensors (Adafactor, Muon) does where the plan cuts none; one that looks at all parameters at once,
or calls the model again, does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raypar.errors import OptimizerError
from raypar.stages.optimizers import EXAMPLE, check_cut, empty_optimizer
from raypar.stages.recipe import Recipe
from raypar.stages.spec import OptimizerFn, ParamForms, RankSpec
from raypar.stages.update import build_scheduler, differences, not_resumed, scheduler_state
from raypar.train.checkpoint import Checkpoint

_REFUSED = {
    "LBFGS": "it evaluates the model several times in a step and mixes all parameters of the model "
    "in one line search, which no rank has; use AdamW, Adam or SGD",
    "SparseAdam": "it needs sparse gradients, and raypar's gradients are dense; use Adam, and "
    "Embedding(sparse=False)",
}


def check_recipe(optimizer: Any, recipe: Recipe, forms: ParamForms) -> None:
    """Checks, before anything is started, all that decides the numbers of a training.

    The optimizer is built once, on empty tensors of the model's shapes, to see what it is.

    Args:
        optimizer: A callable from parameters to an optimizer, such as
            ``lambda params: torch.optim.AdamW(params, lr=3e-4)``, or an optimizer class; one whose
            first parameter is called ``named_parameters`` is given (name, parameter) pairs.
        recipe: What goes with it.
        forms: The model's parameters (`raypar.OpGraph.params`).

    Raises:
        OptimizerError: Optimizer or scheduler cannot be built or not be resumed, the optimizer
            cannot be run on one rank's parameters, or the loss is scaled for parameters that are
            float16 themselves.
    """
    built = _check_built(_callable(optimizer), forms)
    if recipe.scheduler is not None:
        scheduler_state(build_scheduler(recipe.scheduler, built))
    if recipe.loss_scale is not None:
        coarse = [n for n, (_, dtype, trained) in forms.items() if trained and dtype == "float16"]
        if coarse:
            raise OptimizerError(
                f"loss scaling is for float32 parameters under float16 autocast, and {coarse[0]!r} "
                f"and {len(coarse) - 1} other trained parameters are float16, in which gradients "
                "cannot be unscaled: leave the model in float32 (without .half()), and let "
                'precision="fp16" choose the ops'
            )


def check_resumed(optimizer: Any, recipe: Recipe, forms: ParamForms, saved: Checkpoint) -> None:
    """Checks, before anything is started, that a checkpoint can be gone on from.

    Args:
        optimizer: As in `check_recipe`.
        recipe: What goes with it.
        forms: The model's parameters.
        saved: The checkpoint.

    Raises:
        OptimizerError: It was trained with another optimizer, scheduler, or other options of the
            recipe; the text names each of them.
    """
    state: Any = saved.index.values.get("update")
    built, _ = empty_optimizer(optimizer, forms)
    scheduler = None if recipe.scheduler is None else build_scheduler(recipe.scheduler, built)
    try:
        wrong = differences(state, built, scheduler, recipe)
    except (KeyError, TypeError, AttributeError):
        return  # damaged: the ranks tell how, when they read it
    if wrong:
        raise OptimizerError(not_resumed(wrong, f"checkpoint {saved.path}"))


def check_optimizer_on(specs: Sequence[RankSpec]) -> None:
    """Checks, before anything is started, that the optimizer may see the parts that ranks hold.

    Args:
        specs: Every rank's spec; they hold the optimizer.

    Raises:
        OptimizerError: It needs parameters whole that the plan cuts.
    """
    built, _ = empty_optimizer(specs[0].optimizer, specs[0].forms)
    for spec in {spec.group: spec for spec in specs}.values():
        check_cut(built, spec.params, spec.axes)


def _callable(optimizer: Any) -> OptimizerFn:
    if isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            f"optimizer is a built {type(optimizer).__name__}; every rank needs its own: pass a "
            f"callable that builds it from parameters, {EXAMPLE}"
        )
    if not callable(optimizer):
        raise OptimizerError(
            f"optimizer is {optimizer!r}; pass a callable that builds a torch.optim.Optimizer from "
            f"parameters, {EXAMPLE}"
        )
    refused = getattr(optimizer, "__name__", "")
    if refused in _REFUSED and getattr(optimizer, "__module__", "").startswith("torch.optim"):
        raise _refused(refused)
    return optimizer  # type: ignore[no-any-return]


def _check_built(optimizer: OptimizerFn, forms: ParamForms) -> torch.optim.Optimizer:
    built, _ = empty_optimizer(optimizer, forms)
    for kind in type(built).__mro__:
        if kind.__name__ in _REFUSED and kind.__module__.startswith("torch.optim"):
            raise _refused(kind.__name__)
    return built


def _refused(name: str) -> OptimizerError:
    return OptimizerError(f"optimizer torch.optim.{name} cannot be used: {_REFUSED[name]}")
