"""The raw trace: one forward pass with the loss, as an fx graph of pre-dispatch aten ops.

`make_fx(pre_dispatch=True)` keeps linear, layer_norm, attention, dropout, batch_norm and
cross_entropy whole. Beside the nodes we record which module and which source line made each one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from raypar.compat import DATA_DEPENDENT_ERRORS, current_graph, fake_mode, make_fx, pytree
from raypar.errors import CaptureError
from raypar.graph.batchspec import BatchSpec

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


@dataclass
class RawTrace:
    """A traced forward pass.

    Attributes:
        module: The graph; its placeholders are parameters, buffers, then inputs, in order.
        params: Parameter name → placeholder (first names only; aliases share a placeholder).
        buffers: Buffer name → placeholder.
        inputs: One placeholder per example tensor.
    """

    module: fx.GraphModule
    params: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: list[fx.Node]


class _Recorder(TorchFunctionMode):
    """Notes the module path and the user's source line for every node that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = [""]
        self.marks: dict[str, tuple[str, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        graph = current_graph()
        before = len(graph.nodes) if graph is not None else 0
        result = func(*args, **(kwargs or {}))
        if graph is not None and len(graph.nodes) > before:
            mark = (self.path[-1], user_line())
            for node in reversed(graph.nodes):
                if node.name in self.marks or node.op == "placeholder":
                    break
                self.marks[node.name] = mark
        return result


def user_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor raypar's capture code."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "unknown line"


def _line_of(error: BaseException) -> str:
    found = "unknown line"
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)) and not name.startswith("<"):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _fake_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
    ).requires_grad_(tensor.requires_grad)


def trace_forward(
    model: nn.Module,
    loss_of: Callable[[Callable[..., Any], Any], torch.Tensor],
    spec: BatchSpec,
    batch_size: int,
) -> RawTrace:
    """Traces the model with its loss on fake tensors of the given batch size.

    Args:
        model: The module; its tensors may live on the meta device.
        loss_of: Called with the (functional) model and the example batch; returns the loss.
        spec: The example batch's form.
        batch_size: Samples of the traced batch.

    Raises:
        CaptureError: The forward pass needs tensor values, or fails; names the source line.
    """
    named_params = dict(model.named_parameters())
    named_buffers = dict(model.named_buffers())
    mode = fake_mode()
    with mode:
        params = {name: _fake_like(p) for name, p in named_params.items()}
        buffers = {name: _fake_like(b) for name, b in named_buffers.items()}
        inputs = [
            torch.empty(shape, dtype=dtype, device="cpu")
            for shape, dtype in spec.tensor_specs(batch_size)
        ]
    recorder = _Recorder()
    hooks = _path_hooks(model, recorder)

    def forward(
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> torch.Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, {**params, **buffers}, args, kwargs)

        with recorder:
            return loss_of(call, spec.rebuild(inputs))

    try:
        with torch.enable_grad():
            module = make_fx(
                forward, tracing_mode="fake", _allow_non_fake_inputs=True, pre_dispatch=True
            )(params, buffers, inputs)
    except CaptureError:
        raise
    except DATA_DEPENDENT_ERRORS as error:
        raise CaptureError(
            f"{_line_of(error)}: the model's Python code asks for a tensor's value or a size that "
            f"depends on it ({_first_line(error)}). A captured graph is the same for every batch: "
            "compute it with tensor ops (torch.where, masks), or pass the number as a plain "
            "Python value in the batch."
        ) from error
    except Exception as error:
        raise CaptureError(
            f"{_line_of(error)}: the forward pass failed while it was captured: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in module.graph.nodes:
        path, line = recorder.marks.get(node.name, ("", "unknown line"))
        node.meta["module_path"], node.meta["source"] = path, line
    cut, end = len(params), len(params) + len(buffers)
    return RawTrace(
        module,
        dict(zip(params, placeholders[:cut], strict=True)),
        dict(zip(buffers, placeholders[cut:end], strict=True)),
        placeholders[end:],
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _path_hooks(model: nn.Module, recorder: _Recorder) -> list[Any]:
    hooks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            recorder.path.append(name)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.path.pop()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name), prepend=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensor leaves of a pytree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
