"""`capture`: a PyTorch model, its loss and one example batch become an `OpGraph`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raypar.errors import CaptureError
from raypar.graph.batchspec import BatchSpec
from raypar.graph.build import NeedsRealTensors, build_graph
from raypar.graph.opgraph import OpGraph
from raypar.graph.turns import in_turn

ModelFn = Callable[[], nn.Module]
LossFn = Callable[..., torch.Tensor]


@in_turn
def capture(
    model_fn: ModelFn | nn.Module,
    example_batch: Any,
    loss_fn: LossFn | None = None,
    batch_dims: Any = None,
) -> OpGraph:
    """Captures the forward pass of a model with its loss.

    The model is built on the meta device where it lets itself be, so that one too large for this
    machine can be planned.

    Args:
        model_fn: Builds the module; a module itself is also taken.
        example_batch: One *global* batch: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a pair ``(tuple, dict)``.
        loss_fn: Maps the module's output to a scalar loss. Called as ``loss_fn(output)``,
            ``loss_fn(output, batch)``, or, where the module takes only the first of the
            positional arguments, as ``loss_fn(output, *the_others)``. Without it the module's
            output is the loss, or has it as ``.loss``.
        batch_dims: Batch dim of every example tensor (same structure, int or None for
            broadcast); default: dim 0 of every tensor whose dim 0 is the batch size.

    Raises:
        CaptureError: The model cannot be captured; names the source line and the way out.
    """
    spec = BatchSpec.of(example_batch, batch_dims)
    error: Exception | None = None
    for on_meta in (True, False):
        try:
            model = build_model(model_fn, on_meta=on_meta)
        except Exception as problem:
            if on_meta and not isinstance(problem, CaptureError):
                continue
            raise
        loss_of = _loss_of(model, loss_fn)
        try:
            graph = build_graph(model, loss_of, spec, spec.size)
        except (CaptureError, NeedsRealTensors) as problem:
            error = problem
            if on_meta:
                continue
            raise
        return OpGraph(graph, model, loss_of, spec, model_fn, loss_fn)
    assert error is not None
    raise error


def build_model(model_fn: ModelFn | nn.Module, *, on_meta: bool) -> nn.Module:
    """Builds the module without touching the global random state.

    Raises:
        CaptureError: `model_fn` fails on real tensors, or makes no module.
    """
    if isinstance(model_fn, nn.Module):
        return model_fn
    device = torch.device("meta") if on_meta else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), device:
        try:
            model = model_fn()
        except Exception as error:
            if on_meta:
                raise
            raise CaptureError(
                f"model_fn raised {type(error).__name__}: {error}; it is called without arguments "
                "and must return a torch.nn.Module"
            ) from error
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model_fn returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def split_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of the module for one batch."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], dict):
            return tuple(batch[0]), batch[1]
        return tuple(batch), {}
    if hasattr(batch, "items"):
        return (), dict(batch.items())
    return (batch,), {}


def _loss_of(
    model: nn.Module, loss_fn: LossFn | None
) -> Callable[[Callable[..., Any], Any], torch.Tensor]:
    def loss_of(call: Callable[..., Any], batch: Any) -> torch.Tensor:
        return loss_from(model, loss_fn, call_model(model, loss_fn, call, batch), batch)

    return loss_of


def call_model(
    model: nn.Module, loss_fn: LossFn | None, call: Callable[..., Any], batch: Any
) -> Any:
    """The module's output for a batch: it gets all but what is left for the loss function.

    Raises:
        CaptureError: Something is left, and there is no loss function.
    """
    args, kwargs = split_arguments(batch)
    taken = _positional(model, args, kwargs)
    if loss_fn is None and taken < len(args):
        name = type(model).__name__
        raise CaptureError(
            f"a batch has {len(args)} parts, of which {name}.forward"
            f"{inspect.signature(model.forward)} takes {taken}, and there is no loss function for "
            "the rest. Pass loss_fn (model.loss of a config), such as "
            "torch.nn.functional.cross_entropy: it is called with the output and the rest. Or let "
            f"{name} take all parts and return the loss"
        )
    return call(*args[:taken], **kwargs)


def loss_from(model: nn.Module, loss_fn: LossFn | None, output: Any, batch: Any) -> torch.Tensor:
    """The loss of a batch, given the module's output for it.

    Raises:
        CaptureError: It is not one floating-point number.
    """
    if loss_fn is None:
        return _scalar(_own_loss(output))
    args, kwargs = split_arguments(batch)
    taken = _positional(model, args, kwargs)
    if taken < len(args):
        return _scalar(loss_fn(output, *args[taken:]))
    return _scalar(loss_fn(output, batch) if _wants_batch(loss_fn) else loss_fn(output))


def _positional(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many of the positional arguments the module's forward takes."""
    signature = inspect.signature(model.forward)
    for count in range(len(args), -1, -1):
        try:
            signature.bind(*args[:count], **kwargs)
        except TypeError:
            continue
        return count
    given = f"{len(args)} positional arguments" if args else ""
    advice = ""
    if kwargs:
        names = ", ".join(sorted(map(str, kwargs)))
        given += f"{' and ' if args else ''}the keyword arguments {names}"
        advice = (
            ". A dict of tensors becomes keyword arguments: let forward take these names, and **_ "
            "for those that only the loss function reads; or yield a tuple of one dict, ({...},): "
            "forward then takes that dict as one argument, and the loss function the tuple"
        )
    raise CaptureError(
        f"{type(model).__name__}.forward{signature} cannot be called with the example batch: "
        f"{given}{advice}"
    )


def _wants_batch(loss_fn: LossFn) -> bool:
    target = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        signature = inspect.signature(target)
        signature.bind(None)
    except TypeError:
        return True
    except ValueError:
        return False
    kinds = [
        p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len([p for p in kinds if p.default is p.empty]) >= 2


def _own_loss(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, dict):
        found = output.get("loss")
    if found is None:
        raise CaptureError(
            f"the module returned {type(output).__name__} without a loss; return the loss, or an "
            "object with .loss, or pass loss_fn (for Hugging Face models: pass labels)"
        )
    return found


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"the loss is {type(loss).__name__}; it must be a scalar tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise CaptureError(
            f"the loss has shape {tuple(loss.shape)} and dtype {loss.dtype}; it must be one "
            "floating-point number: reduce it with .mean() or .sum(), or pass a loss_fn"
        )
    return loss.reshape(()) if loss.dim() else loss


__all__ = ["build_model", "call_model", "capture", "loss_from", "split_arguments"]
