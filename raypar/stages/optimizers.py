"""A rank's optimizer: built from its parts of the parameters, with the groups of the whole model.

An element-wise rule gives every element what it gives on the whole parameter. One that looks at
rows, columns or whole tensors does not, and is refused where parameters are cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from raypar.errors import OptimizerError, RayparError
from raypar.sharding.layout import Axes, ParamLayout
from raypar.stages.spec import OptimizerFn, ParamForms

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""torch's optimizers that treat every element alone."""

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Classes that torch can update in one kernel of a GPU."""

EXAMPLE = "for example lambda params: torch.optim.AdamW(params, lr=3e-4)"
_MEMBERS = ("params", "param_names")


def is_elementwise(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer class treats every element alone, as far as is known.

    It is one of `ELEMENTWISE`, a subclass of one that keeps its ``step``, or says so itself with
    a class attribute ``elementwise = True``.
    """
    if getattr(kind, "elementwise", False) is True:
        return True
    step = inspect.unwrap(kind.step)
    return any(
        issubclass(kind, known) and step is inspect.unwrap(known.step) for known in ELEMENTWISE
    )


def check_cut(
    optimizer: torch.optim.Optimizer, layouts: Mapping[str, ParamLayout], axes: Axes
) -> None:
    """Refuses an optimizer that would see parts of parameters and needs them whole.

    Args:
        optimizer: As built from the parts that one rank stores.
        layouts: Parameters of the rank group.
        axes: Its mesh.

    Raises:
        OptimizerError: Names a parameter that is cut, and what to change.
    """
    kind = type(optimizer)
    if is_elementwise(kind):
        return
    sizes = [size for _, size in axes]
    for name, layout in layouts.items():
        local = layout.stored.local_shape(layout.shape, sizes)
        if local == layout.shape:
            continue
        taken = layout.held.value().local_shape(layout.shape, sizes)
        change = (
            "give the stages that read it memory.zero = 0"
            if taken == layout.shape
            else "leave the ops that read it out of the stage's sharding (they are then whole), "
            "with memory.zero = 0"
        )
        raise OptimizerError(
            f"optimizer {kind.__name__} is not known to treat every element of a parameter alone, "
            f"and a rank holds just {local} of {name!r} {layout.shape} (stored as "
            f"{layout.stored} on {dict(axes)}): {change}; or use an element-wise one, for example "
            "torch.optim.AdamW; or, if it is element-wise, say so with a class attribute "
            "elementwise = True"
        )


def call_optimizer(
    make: OptimizerFn, named: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Calls an optimizer function with what it asks for.

    Args:
        make: Takes parameters or, if its first parameter is called ``named_parameters``,
            (name, parameter) pairs, from which it can make groups by name.
        named: The parameters in the model's order.
    """
    pairs = list(named)
    return make(pairs if _wants_names(make) else [p for _, p in pairs])


def empty_optimizer(
    make: OptimizerFn, forms: ParamForms
) -> tuple[torch.optim.Optimizer, list[list[str]]]:
    """The optimizer of the whole model, built without memory.

    Args:
        make: As for `call_optimizer`.
        forms: All parameters of the model.

    Returns:
        It, and the names of every group's parameters.

    Raises:
        OptimizerError: `make` raises, or makes no optimizer of these parameters.
    """
    empty = {
        name: nn.Parameter(torch.empty(shape, dtype=_dtype(kind), device="meta"), trained)
        for name, (shape, kind, trained) in forms.items()
    }
    return _grouped(make, empty)


def build_optimizer(
    make: OptimizerFn,
    forms: ParamForms,
    held: Mapping[str, nn.Parameter],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer of one rank.

    `make` sees all parameters of the model, also those of other ranks, so that every rank gets the
    same groups; what a group says (learning rate, weight decay, ...) is what it says on whole
    parameters, and the groups then keep what the rank holds, if that is nothing too.

    Args:
        make: As for `call_optimizer`.
        forms: All parameters of the model, in its order.
        held: The parts that this rank stores, by name.
        device: Where they are.

    Raises:
        OptimizerError: `make` raises, makes no optimizer of these parameters, or makes other
            groups the second time.
    """
    whole, groups = empty_optimizer(make, forms)
    shown = {
        name: held[name]
        if name in held
        else nn.Parameter(
            torch.zeros((1,) * len(shape), dtype=_dtype(kind), device=device), trained
        )
        for name, (shape, kind, trained) in forms.items()
    }
    made, found = _grouped(make, shown)
    if len(found) != len(groups):
        raise OptimizerError(
            f"the optimizer callable made {len(groups)} parameter groups from the whole model and "
            f"{len(found)} from what a rank holds of it; make them from the parameters' names and "
            "numbers of dims, which are the same everywhere (a first parameter called "
            "named_parameters is given (name, parameter) pairs)"
        )
    for group, names, source in zip(made.param_groups, groups, whole.param_groups, strict=True):
        kept = [n for n in names if n in held]
        group["params"] = [shown[n] for n in kept]
        if "param_names" in group:
            group["param_names"] = kept
        group.update({k: v for k, v in source.items() if k not in _MEMBERS and not _is_empty(v)})
    for name, param in shown.items():
        if name not in held:
            made.state.pop(param, None)
    prefer_fused(made, device)
    return made


def prefer_fused(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """On a GPU, has torch's own classes update all of a group in one kernel.

    Groups that say how they want to be updated (``fused``, ``foreach``, ``differentiable``) and
    parameters that the kernel does not take stay as they are.
    """
    if device.type != "cuda" or type(optimizer) not in _FUSED:
        return
    for group in optimizer.param_groups:
        said = group.get("foreach") is not None or group.get("differentiable")
        fits = all(p.is_floating_point() for p in group["params"])
        if group.get("fused") is None and not said and fits:
            group["fused"] = True


def _grouped(
    make: OptimizerFn, params: Mapping[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[list[str]]]:
    """Builds an optimizer, and names the members of its groups."""
    try:
        made = call_optimizer(make, params.items())
    except RayparError:
        raise
    except Exception as error:
        raise OptimizerError(
            f"the optimizer callable raised {type(error).__name__}: {error}; it is called on every "
            f"rank with the parameters of the model, {EXAMPLE}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise OptimizerError(
            f"the optimizer callable returned {type(made).__name__}, not a torch.optim.Optimizer; "
            f"{EXAMPLE}"
        )
    names = {id(p): n for n, p in params.items()}
    if any(id(p) not in names for group in made.param_groups for p in group["params"]):
        raise OptimizerError(
            f"the optimizer callable made a {type(made).__name__} of parameters that it was not "
            f"given; every rank has to update its own parts: use those that it is given, {EXAMPLE}"
        )
    return made, [[names[id(p)] for p in group["params"]] for group in made.param_groups]


def _wants_names(make: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # built-in callables may have none
        return False
    return next(iter(parameters), "") == "named_parameters"


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
