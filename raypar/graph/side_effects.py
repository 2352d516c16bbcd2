"""What a forward pass does beside its ops, and what autograd does beside their derivatives.

A graph of forward ops says nothing of hand-written backward passes, of hooks on gradients, or of
Python state that a module changes in every call. Each of these would be lost in silence, so it is
found here and refused, or brought into a form that the graph can hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raypar.compat import has_gradient_hooks, set_validation
from raypar.errors import CaptureError

_MODULE_KEYS = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str)


def refuse_hooks(model: nn.Module) -> None:
    """Refuses hooks that would change gradients where the graph cannot see it.

    Raises:
        CaptureError: A parameter has a gradient hook.
    """
    for name, parameter in model.named_parameters():
        if has_gradient_hooks(parameter):
            raise CaptureError(
                f"parameter {name!r} has a gradient hook (register_hook), which is not part of the "
                "forward pass and would be lost; write it as ops in the forward pass, for example "
                "w = mask * w + ((1 - mask) * w).detach() for a gradient mask"
            )


REFUSED: dict[Any, str] = {
    torch.Tensor.register_hook: (
        "the forward pass registers a hook on a tensor's gradient, which a captured graph cannot "
        "hold; write it as ops, for example 2 * x.detach() - x for a reversed gradient"
    ),
    torch.autograd.grad: (
        "the forward pass takes gradients itself (torch.autograd.grad), which cannot be captured; "
        "write the derivative as tensor ops, or leave the term out of the captured loss"
    ),
    torch.Tensor.backward: (
        "the forward pass calls backward() itself, which cannot be captured; return the loss"
    ),
}
"""Functions that a captured graph cannot hold → what to say."""


@contextlib.contextmanager
def visible_backwards(where: Callable[[], str]) -> Iterator[None]:
    """While open, hand-written backward passes are refused; argument checks ask for no values.

    Args:
        where: Gives the user's source line.
    """
    plain = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        module, name = cls.__module__, cls.__qualname__
        if module == "torch.utils.checkpoint":
            if name == "CheckpointFunction":
                # Re-entrant checkpointing hides the inner pass from autograd; what is recomputed
                # is the plan's choice here.
                return args[0](*args[2:])
            return plain.__get__(None, cls)(*args, **kwargs)
        if name.startswith("BackwardHookFunction"):
            raise CaptureError(
                f"{where()}: a module has a backward hook (register_full_backward_hook), which a "
                "captured graph cannot hold; remove it before capture"
            )
        raise CaptureError(
            f"{where()}: {name} is a torch.autograd.Function: its hand-written backward is not "
            "part of the forward pass and would be lost. Write it with ops whose derivative is the "
            "wanted one, for example y = x + (f(x) - x).detach() for a straight-through estimator, "
            "or 2 * x.detach() - x for a reversed gradient"
        )

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        with set_validation(False), _inference_as_no_grad():
            yield
    finally:
        torch.autograd.Function.apply = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _inference_as_no_grad() -> Iterator[None]:
    """While open, ``torch.inference_mode`` is ``torch.no_grad``, which a trace records."""
    mode: Any = torch.inference_mode
    enter, leave = mode.__enter__, mode.__exit__

    def begin(self: Any) -> None:
        self.raypar_no_grad = torch.no_grad() if self.mode else contextlib.nullcontext()
        self.raypar_no_grad.__enter__()

    def end(self: Any, *error: Any) -> None:
        self.raypar_no_grad.__exit__(*error)

    mode.__enter__, mode.__exit__ = begin, end
    try:
        yield
    finally:
        mode.__enter__, mode.__exit__ = enter, leave


def _gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.gaussian_nll_loss` without its check for negative variances, which asks for values."""
    if isinstance(var, float):
        var = var * torch.ones_like(input)
    elif var.size() != input.size() and input.size()[:-1] == var.size():
        var = torch.unsqueeze(var, -1)
    floor = var.detach().clamp(min=eps)
    var = var + (floor - var).detach()  # torch clamps outside autograd
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * 1.8378770664093453  # log(2 pi)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


SUBSTITUTES: dict[Any, Callable[..., Any]] = {F.gaussian_nll_loss: _gaussian_nll_loss}
"""Functions that ask for tensor values just to check them → the same without the check."""


@dataclass
class Change:
    """One attribute that a forward pass changed.

    Attributes:
        name: Path of the attribute.
        value: What it holds now.
    """

    name: str
    value: Any


class ModuleState:
    """The Python attributes of a module and all its children, before a trace."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = [
            (name, module, {k: v for k, v in vars(module).items() if k not in _MODULE_KEYS})
            for name, module in model.named_modules()
        ]
        self._inside = [
            (value, value.copy())
            for _, _, attributes in self._seen
            for value in attributes.values()
            if type(value) in (list, dict, set)
        ]

    def restore(self) -> list[Change]:
        """Puts everything back; returns what had changed."""
        changes = []
        for path, module, attributes in self._seen:
            now = vars(module)
            for key in [k for k in now if k not in _MODULE_KEYS and k not in attributes]:
                changes.append(Change(f"{path}.{key}".lstrip("."), now.pop(key)))
            for key, value in attributes.items():
                found = now.get(key)
                if found is value or (isinstance(value, _PLAIN) and found == value):
                    continue
                changes.append(Change(f"{path}.{key}".lstrip("."), found))
                now[key] = value
        for value, copy in self._inside:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        return changes

    def impose(self, changes: list[Change]) -> None:
        """Sets changed attributes again, as the next forward pass would find them."""
        modules = {name: module for name, module, _ in self._seen}
        for change in changes:
            path, _, key = change.name.rpartition(".")
            vars(modules[path])[key] = change.value


__all__ = [
    "REFUSED",
    "SUBSTITUTES",
    "Change",
    "ModuleState",
    "refuse_hooks",
    "visible_backwards",
]
