"""Every private torch or Ray name that raypar uses, in this one file."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "argument_defaults",
    "argument_names",
    "current_graph",
    "fake_mode",
    "forgetting_sizes",
    "is_autocast_enter",
    "is_autocast_exit",
    "is_grad_mode_switch",
    "is_mutable",
    "make_fx",
    "overload_name",
    "pytree",
    "raw_callable",
    "schema_name",
    "storage_id",
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


def forgetting_sizes(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """A trial run under `mode` whose data-dependent sizes no later trace has to account for."""
    env = mode.shape_env
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


def current_graph() -> torch.fx.Graph | None:
    """The fx graph that `make_fx` is writing right now, if any."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


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


def written_arguments(op: OpOverload) -> list[str]:
    """Names of the arguments that the operator writes to."""
    return [
        a.name
        for a in op._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]


def raw_callable(op: OpOverload) -> Any:
    """The operator's dispatcher entry, one Python frame cheaper to call than the overload."""
    return op._op


def ray_address_on_this_machine() -> str | None:
    """``host:port`` of the Ray that was last started on this machine, running or not.

    `ray.init` reads the same file; there is no public name that looks without connecting.
    """
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) or None


def ray_free_by_node() -> dict[str, dict[str, float]]:
    """Ray node id → resources that are free now; the public call adds all nodes up."""
    from ray._private.state import available_resources_per_node

    return {
        node: {name: float(amount) for name, amount in free.items()}
        for node, free in available_resources_per_node().items()
    }
