"""Communication backends by name.

A registered backend is not the same as an available one: ``nccl`` is registered everywhere, and
`unavailable` says why it cannot be used here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from raypar.comm.group import Group
from raypar.errors import CommError, did_you_mean

_BACKENDS: dict[str, tuple[str, Callable[[], str | None]]] = {}


def register_backend(
    name: str, target: str, unavailable: Callable[[], str | None] = lambda: None
) -> None:
    """Adds a backend.

    Args:
        name: Its name, as in a configuration.
        target: ``module:Class`` of its `Group`; imported when it is asked for. The class has a
            ``create(name, rank, size, address, *, host, timeout_s, network)`` as
            `raypar.comm.gloo.GlooGroup`, which binds its sockets as ``network`` says.
        unavailable: Says why it cannot be used on this machine, or None.

    Raises:
        CommError: The name is taken, or `target` is not of that form.
    """
    if name in _BACKENDS:
        raise CommError(f"backend {name!r} is registered already, as {_BACKENDS[name][0]}")
    if target.count(":") != 1:
        raise CommError(f"backend {name!r}: target is 'module:Class', found {target!r}")
    _BACKENDS[name] = (target, unavailable)


def backend_names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_BACKENDS))


def get_backend(name: str) -> type[Group]:
    """The group class of a backend.

    Raises:
        CommError: Unknown name, not available here, or not a `Group`.
    """
    if name not in _BACKENDS:
        raise CommError(
            f"unknown comm backend {name!r}; registered: {', '.join(backend_names())}."
            f"{did_you_mean(name, _BACKENDS)}"
        )
    reason = unavailable(name)
    if reason is not None:
        raise CommError(f"comm backend {name!r} cannot be used here: {reason}")
    module, _, attribute = _BACKENDS[name][0].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Group)):
        raise CommError(f"comm backend {name!r}: {_BACKENDS[name][0]} is not a Group")
    return found


def unavailable(name: str) -> str | None:
    """Why a registered backend cannot be used on this machine; None if it can.

    Raises:
        CommError: Unknown name.
    """
    if name not in _BACKENDS:
        raise CommError(f"unknown comm backend {name!r}; registered: {', '.join(backend_names())}")
    return _BACKENDS[name][1]()


def backend_for(device: torch.device | str) -> str:
    """The name of the backend for tensors of a device between processes."""
    return "nccl" if torch.device(device).type == "cuda" else "gloo"


def _nccl_unavailable() -> str | None:
    from raypar.comm.nccl import unavailable_reason

    return unavailable_reason()


register_backend("local", "raypar.comm.local:LocalGroup")
register_backend("gloo", "raypar.comm.gloo:GlooGroup")
register_backend("nccl", "raypar.comm.nccl:NcclGroup", _nccl_unavailable)
