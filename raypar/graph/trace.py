"""The raw trace: one forward pass with the loss, as an fx graph of pre-dispatch aten ops.

`make_fx(pre_dispatch=True)` keeps linear, layer_norm, attention, dropout, batch_norm and
cross_entropy whole. Beside the nodes we record which module and which source line made each one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from raypar.compat import (
    DATA_DEPENDENT_ERRORS,
    OpOverload,
    current_graph,
    fake_mode,
    is_mutable,
    make_fx,
    outside_trace,
    pytree,
    silent_fakes,
    traced_attribute,
    traced_node,
)
from raypar.errors import CaptureError
from raypar.graph.batchspec import BatchSpec
from raypar.graph.side_effects import (
    REFUSED,
    SUBSTITUTES,
    Change,
    ModuleState,
    refuse_hooks,
    visible_backwards,
)

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

LossOf = Callable[[Callable[..., Any], Any], torch.Tensor | list[torch.Tensor]]
"""Calls the (functional) model with a batch; returns the loss, or all results."""


@dataclass
class RawTrace:
    """A traced forward pass.

    Attributes:
        module: The graph; its placeholders are parameters, buffers, then inputs, in order.
        params: Parameter name → placeholder (first names only; aliases share a placeholder).
        buffers: Buffer name → placeholder.
        inputs: One placeholder per example tensor.
        reassigned: Buffers that the module replaced; their new values follow the results in the
            output.
        built_from_constants: Module attributes that now hold a tensor which depends on neither
            inputs, parameters nor buffers.
        n_results: Number of leading outputs: the loss, or the results that were asked for.
    """

    module: fx.GraphModule
    params: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: list[fx.Node]
    reassigned: list[str]
    built_from_constants: frozenset[str] = frozenset()
    n_results: int = 1


class _Recorder(TorchFunctionMode):
    """Notes the module path and the user's source line for every node that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = [""]
        self.marks: dict[str, tuple[str, str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise CaptureError(f"{user_line()}: {REFUSED[func]}")
        if func in _VALUE_READS and args:
            known = _constant_value(args[0])
            if known is not None:
                with outside_trace():
                    return func(known, *args[1:], **(kwargs or {}))
        func = SUBSTITUTES.get(func, func)
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


_VALUE_READS = frozenset(
    {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
    }
)
_MOST_READ = 1 << 24


def _constant_value(tensor: Any) -> torch.Tensor | None:
    """The value of a traced tensor that depends on neither inputs, parameters nor buffers.

    Masks, position tables and window sizes are often looked at in Python; computing them is safe,
    as they are the same for every batch.
    """
    node = traced_node(tensor) if isinstance(tensor, torch.Tensor) else None
    if node is None:
        return None
    order: dict[fx.Node, None] = {}
    pending = [(node, False)]
    while pending:
        current, done = pending.pop()
        if done:
            order[current] = None
        elif current not in order:
            value = current.meta.get("val")
            size = value.numel() if isinstance(value, torch.Tensor) else 0
            random = isinstance(current.target, OpOverload) and (
                torch.Tag.nondeterministic_seeded in current.target.tags
                or is_mutable(current.target)
            )
            if current.op not in ("get_attr", "call_function") or random or size > _MOST_READ:
                return None
            pending.append((current, True))
            pending.extend((i, False) for i in current.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with outside_trace():
        for current in order:
            if current.op == "get_attr":
                values[current] = traced_attribute(str(current.target))
                if not isinstance(values[current], torch.Tensor) or values[current].is_meta:
                    return None
                continue
            args, kwargs = fx.map_arg((current.args, current.kwargs), lambda n: values[n])
            values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    found = values[node]
    return found if isinstance(found, torch.Tensor) and not _written(order) else None


def _written(nodes: Collection[fx.Node]) -> bool:
    """Whether some op wrote to one of these values in place, or to a view of it."""
    for node in next(iter(nodes)).graph.nodes:
        if isinstance(node.target, OpOverload) and is_mutable(node.target):
            source = node.args[0] if node.args else None
            while isinstance(source, fx.Node):
                if source in nodes:
                    return True
                source = source.args[0] if source.args else None
    return False


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
    loss_of: LossOf,
    spec: BatchSpec,
    batch_size: int,
    *,
    training: bool = True,
) -> RawTrace:
    """Traces the model with its loss on fake tensors of the given batch size.

    Args:
        model: The module; its tensors may live on the meta device.
        loss_of: Called with the (functional) model and the example batch; returns the loss, or all
            results.
        spec: The example batch's form.
        batch_size: Samples of the traced batch.
        training: Whether gradients will be taken; if not, it runs under ``no_grad``.

    Raises:
        CaptureError: The forward pass needs tensor values, or fails; names the source line.
    """
    refuse_hooks(model)
    state = ModuleState(model)
    try:
        raw, recorder = _trace_once(model, loss_of, spec, batch_size, training)
    finally:
        changes = state.restore()
    if changes:
        _check_python_state(state, changes, raw, model, loss_of, spec, batch_size, training)
    for node in raw.module.graph.nodes:
        path, line = recorder.marks.get(node.name, ("", "unknown line"))
        node.meta["module_path"], node.meta["source"] = path, line
    return raw


def _trace_once(
    model: nn.Module, loss_of: LossOf, spec: BatchSpec, batch_size: int, training: bool
) -> tuple[RawTrace, _Recorder]:
    named_params = dict(model.named_parameters())
    named_buffers = dict(model.named_buffers())
    mode = fake_mode()
    try:
        with mode:
            params = {name: _fake_like(p) for name, p in named_params.items()}
            buffers = {name: _fake_like(b) for name, b in named_buffers.items()}
            inputs = [
                torch.empty(shape, dtype=dtype, device="cpu")
                for shape, dtype in spec.tensor_specs(batch_size)
            ]
    except RuntimeError as error:
        if "uninitialized" not in str(error):
            raise
        raise CaptureError(
            "the model has lazy modules (nn.LazyLinear and the like) without shapes yet; run one "
            "forward pass inside model_fn before returning the model"
        ) from error
    recorder = _Recorder()
    hooks = _path_hooks(model, recorder)
    reassigned: list[str] = []
    tables: set[str] = set()
    counts: list[int] = []

    def forward(
        params: dict[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        present = dict(buffers)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**params, **present}
            # functional_call writes back what the module assigned to its buffers.
            result = torch.func.functional_call(model, given, args, kwargs)
            present.update({name: given[name] for name in buffers})
            return result

        with recorder:
            made = loss_of(call, spec.rebuild(inputs))
        results = made if isinstance(made, list) else [made]
        counts[:] = [len(results)]
        tables.update(_tables(model))
        reassigned[:] = [n for n in buffers if present[n] is not buffers[n]]
        _check_buffers(buffers, present, reassigned)
        return [*results, *(present[n] for n in reassigned)]

    try:
        with torch.set_grad_enabled(training), visible_backwards(user_line), silent_fakes():
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
            f"{type(error).__name__}: {_first_line(error).rstrip('.')}. If it does not fail on "
            "real tensors, this call cannot be captured (packed sequences, NumPy, calls out of "
            "torch): use tensor ops of fixed shapes, such as masks over a padded batch"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    cut, end = len(params), len(params) + len(buffers)
    raw = RawTrace(
        module,
        dict(zip(params, placeholders[:cut], strict=True)),
        dict(zip(buffers, placeholders[cut:end], strict=True)),
        placeholders[end:],
        reassigned,
        frozenset(tables),
        counts[0],
    )
    return raw, recorder


def _tables(model: nn.Module) -> set[str]:
    """Attributes with tensors made in this trace that are the same for every batch and step."""
    found = set()
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            node = traced_node(value) if isinstance(value, torch.Tensor) else None
            if node is not None and _depends_on_nothing(node):
                found.add(f"{path}.{key}".lstrip("."))
    return found


def _depends_on_nothing(node: fx.Node) -> bool:
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return False
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return True


def _check_buffers(
    old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], names: list[str]
) -> None:
    for name in names:
        found, wanted = new[name], old[name]
        if not isinstance(found, torch.Tensor):
            raise CaptureError(
                f"the forward pass sets buffer {name!r} to {type(found).__name__}; it must stay a "
                "tensor"
            )
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise CaptureError(
                f"the forward pass changes buffer {name!r} from {tuple(wanted.shape)} "
                f"{wanted.dtype} to {tuple(found.shape)} {found.dtype}; its shape and dtype must "
                "stay the same"
            )


def _check_python_state(
    state: ModuleState,
    changes: list[Change],
    raw: RawTrace,
    model: nn.Module,
    loss_of: LossOf,
    spec: BatchSpec,
    batch_size: int,
    training: bool,
) -> None:
    """Refuses Python attributes that one forward pass leaves to the next.

    What is set but never read again (a kept attention map), and tables that do not depend on the
    batch (lazily built caches), are harmless. The next forward pass is traced with the attributes
    as this one left them: where it runs other ops, they are state that a graph would lose.

    Raises:
        CaptureError: Names the attributes and the way out.
    """
    carried: list[Change] = []
    stand_ins: list[torch.Tensor] = []
    cached = False
    for change in changes:
        if isinstance(change.value, torch.Tensor):
            if change.name in raw.built_from_constants:
                cached = True
                continue
            with torch.no_grad():
                stand_ins.append(torch.zeros(change.value.shape, dtype=change.value.dtype))
            carried.append(Change(change.name, stand_ins[-1]))
        else:
            carried.append(change)
    if not carried or (cached and not stand_ins):
        return
    state.impose(carried)
    try:
        again, _ = _trace_once(model, loss_of, spec, batch_size, training)
        held = [
            getattr(again.module, str(n.target), None)
            for n in again.module.graph.nodes
            if n.op == "get_attr"
        ]
        same = _calls(again) == _calls(raw) and not any(h is t for h in held for t in stand_ins)
    except CaptureError:
        same = False
    finally:
        state.restore()
    if not same:
        names = ", ".join(repr(c.name) for c in carried)
        raise CaptureError(
            f"the forward pass changes the module's Python state ({names}), and the next forward "
            "pass runs differently for it; a captured graph is the same in every step. Make it a "
            "buffer that is updated with tensor ops (register_buffer), or pass it in the batch"
        )


def _calls(raw: RawTrace) -> list[str]:
    return [f"{n.target}{n.args}{n.kwargs}" for n in raw.module.graph.nodes if n.op != "get_attr"]


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
