"""Every private torch name that raypar uses, in this one file; Ray's are in `compat_ray`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "argument_defaults",
    "argument_names",
    "compile_fixed",
    "current_graph",
    "fake_around",
    "fake_mode",
    "forgetting_sizes",
    "form_without_out",
    "has_gradient_hooks",
    "has_own_dispatch",
    "is_autocast_enter",
    "is_autocast_exit",
    "is_grad_mode_switch",
    "is_mutable",
    "make_fx",
    "outside_trace",
    "overload_name",
    "pytree",
    "raw_callable",
    "recording",
    "schema_name",
    "set_validation",
    "silent_fakes",
    "storage_id",
    "take_loader_signal",
    "traced_attribute",
    "traced_node",
    "without_torch_function",
    "wrapped_truncated_normal",
    "written_arguments",
]

# What fake tensors raise where Python asks for a value that only a real run knows.
DATA_DEPENDENT_ERRORS: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


def fake_mode() -> FakeTensorMode:
    """A fake tensor mode that knows data-dependent sizes (unbacked symbols)."""
    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, static_shapes=True)


def compile_fixed(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """`torch.compile` of a whole graph, for the shapes that it is called with alone.

    A call runs the graph as it is while another thread traces, where torch would raise: it takes
    that thread's trace for one of the call.
    """
    from torch._dynamo import config

    config.error_on_nested_fx_trace = False
    found: Callable[..., Any] = torch.compile(graph, dynamic=False, fullgraph=True)
    return found


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """While open, autograd records ops, also inside of an op that a dispatch mode was handed."""
    below = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(below, False), torch.enable_grad():
        yield


def forgetting_sizes(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """A trial run under `mode` whose data-dependent sizes no later trace has to account for."""
    env = mode.shape_env
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


@contextlib.contextmanager
def silent_fakes() -> Iterator[None]:
    """While open, an op that fails on fake tensors raises, and prints no traceback as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_failure)
    try:
        yield
    finally:
        log.removeFilter(_is_no_failure)


def _is_no_failure(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed while attempting to run meta")


def take_loader_signal() -> None:
    """Has torch set its handler of SIGCHLD now, as its first DataLoader with workers would.

    It raises in the main thread when a worker process of any DataLoader dies. It is set once in a
    process; in another thread than the main one this does nothing.
    """
    from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

    _set_SIGCHLD_handler()


def current_graph() -> torch.fx.Graph | None:
    """The fx graph that `make_fx` is writing right now, if any."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def traced_node(tensor: torch.Tensor) -> torch.fx.Node | None:
    """The node of the graph being written by `make_fx` that made `tensor`, if any."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    slot = get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


@contextlib.contextmanager
def outside_trace() -> Iterator[None]:
    """While open, ops run for real: not recorded, not on fake tensors."""
    no_functions = torch._C.DisableTorchFunction
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), no_functions():
        yield


def traced_attribute(name: str) -> Any:
    """What a ``get_attr`` node of the graph being written stands for."""
    mode = get_proxy_mode()
    value: Any = None if mode is None else getattr(mode.tracer, "root", None)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def without_torch_function() -> contextlib.AbstractContextManager[Any]:
    """While open, torch function modes and overrides do not see calls."""
    guard: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return guard


@contextlib.contextmanager
def wrapped_truncated_normal(wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """While open, `torch.nn.init.trunc_normal_` (under any name) runs what `wrap` returns.

    It draws until all values lie within the bounds, and no mode sees it as one call.
    """
    before = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = wrap(before)
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = before


def has_own_dispatch(tensor: torch.Tensor) -> bool:
    """Whether the tensor's class handles operators itself, so that it need not hold its values."""
    disabled = torch._C._disabled_torch_dispatch_impl
    return type(tensor).__torch_dispatch__ is not disabled and type(tensor) is not torch.Tensor


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether hooks would see or change the tensor's gradient."""
    hooks = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return any(hooks)


@contextlib.contextmanager
def set_validation(on: bool) -> Iterator[None]:
    """Whether `torch.distributions` checks the values it is given, while open."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(on)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def is_grad_mode_switch(target: Any) -> bool:
    """Whether a node's target is torch's grad-mode switch (a node of pre-dispatch traces)."""
    return target is torch._C._set_grad_enabled


def is_autocast_enter(target: Any) -> bool:
    """Whether a node's target opens an autocast region."""
    return getattr(target, "__name__", "") == "_enter_autocast"


def is_autocast_exit(target: Any) -> bool:
    """Whether a node's target closes an autocast region."""
    return getattr(target, "__name__", "") == "_exit_autocast"


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a (fake) tensor's storage: equal for tensors that alias each other."""
    return tensor.untyped_storage()._cdata


def fake_around(mode: FakeTensorMode, meta: torch.Tensor, device: torch.device) -> FakeTensor:
    """A fake tensor on `device` with the size and the storage of a meta tensor."""
    return FakeTensor(mode, meta, device)


def schema_name(op: OpOverload) -> str:
    """``namespace::op`` of an operator overload, without the overload's name."""
    return op._schema.name


def is_mutable(op: OpOverload) -> bool:
    """Whether the operator writes to one of its arguments."""
    return op._schema.is_mutable


def overload_name(op: OpOverload) -> str:
    """The overload's name (``Tensor`` of ``aten.add.Tensor``)."""
    return op._overloadname


def argument_names(op: OpOverload) -> list[str]:
    """Names of the operator's arguments, in schema order."""
    return [a.name for a in op._schema.arguments]


def argument_defaults(op: OpOverload) -> list[tuple[str, object]]:
    """(name, default or None) of the operator's arguments, in schema order."""
    return [(a.name, a.default_value) for a in op._schema.arguments]


def form_without_out(op: OpOverload) -> OpOverload | None:
    """The overload that returns what `op` writes to its ``out`` argument."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if a.name != "out"]
    for name in op._overloadpacket.overloads():
        found: OpOverload = getattr(op._overloadpacket, name)
        if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    return None


def written_arguments(op: OpOverload) -> list[str]:
    """Names of the arguments that the operator writes to."""
    return [
        a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]


def raw_callable(op: OpOverload) -> Any:
    """The operator's dispatcher entry, one Python frame cheaper to call than the overload."""
    return op._op
