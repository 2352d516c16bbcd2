"""Graphs as data: what is shipped to a rank is a list of nodes, never code.

Targets are named and looked up in an allow-list on arrival; devices become the receiving rank's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import raypar.graph.randomops
import raypar.sharding.collectives  # noqa: F401  (both register raypar's own ops)
from raypar.compat import OpOverload, fake_mode, overload_name, schema_name
from raypar.errors import PlanError

_NAMESPACES = frozenset({"aten", "prims", "raypar"})
_DENIED = frozenset(
    f"aten::{name}"
    for name in (
        "from_file", "save", "_print", "warn", "wait", "seed", "manual_seed", "set_grad_enabled",
        "set_", "set_data", "_cufft_set_plan_cache_max_size",
    )
)  # fmt: skip
"""Operators that reach beyond their tensors: files, output, the process's state."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    )
} | {
    f"torch.{f.__name__}": f
    for f in (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not)
}
_FUNCTION_NAMES = {f: name for name, f in _FUNCTIONS.items()}

Wire = dict[str, Any]


def pack(graph: fx.Graph) -> Wire:
    """The graph as plain data.

    Raises:
        PlanError: It calls something outside the allow-list.
    """
    index = {node: i for i, node in enumerate(n for n in graph.nodes if n.op != "output")}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", index[value])
        if isinstance(value, tuple):
            return ("tuple", [plain(v) for v in value])
        if isinstance(value, list):
            return ("list", [plain(v) for v in value])
        if isinstance(value, slice):
            return ("slice", [plain(v) for v in (value.start, value.stop, value.step)])
        if isinstance(value, torch.device):
            return ("device", None)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return ("torch", str(value).removeprefix("torch."))
        if value is None or isinstance(value, (bool, int, float, str, complex)):
            return value
        raise PlanError(f"an argument of type {type(value).__name__} cannot be shipped to a rank")

    nodes: list[Any] = []
    result: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            nodes.append(("in", node.meta["id"], tuple(value.shape), plain(value.dtype)))
        elif node.op == "call_function":
            kwargs = {k: plain(v) for k, v in node.kwargs.items()}
            region = node.meta.get("autocast")
            cast = None if region is None else (region[0], plain(region[1]), region[2])
            nodes.append(
                (
                    "call",
                    node.meta["id"],
                    target_name(node.target),
                    plain(list(node.args))[1],
                    kwargs,
                    cast,
                )
            )
        elif node.op == "output":
            result = plain(tuple(node.args[0]))  # type: ignore[arg-type]
    return {"nodes": nodes, "output": result}


def target_name(target: Any) -> str:
    """The name a call target ships under.

    Raises:
        PlanError: It is not in the allow-list.
    """
    if isinstance(target, OpOverload):
        name = schema_name(target)
        if name.split("::")[0] in _NAMESPACES and name not in _DENIED:
            return f"{name}.{overload_name(target)}"
    elif target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise PlanError(
        f"{target} is not an op that may be shipped to a rank; allowed are torch's own operators "
        f"({', '.join(sorted(_NAMESPACES))}) and integer arithmetic on sizes"
    )


def find_target(name: str) -> Callable[..., Any]:
    """The call target of a shipped name.

    Raises:
        PlanError: The name is not in the allow-list, or this torch does not have it.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    space, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    if space in _NAMESPACES and f"{space}::{op}" not in _DENIED:
        try:
            found = getattr(getattr(getattr(torch.ops, space), op), overload)
        except AttributeError:
            raise PlanError(
                f"this torch {torch.__version__} has no operator {name!r}: plan and ranks must use "
                "the same torch version"
            ) from None
        if isinstance(found, OpOverload):
            return found
    raise PlanError(f"{name!r} is not in the list of ops that a rank may run")


def torch_constant(name: str) -> Any:
    """The dtype, layout or memory format of a shipped name.

    Raises:
        PlanError: It is none.
    """
    found = getattr(torch, name, None)
    if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        return found
    raise PlanError(f"malformed graph data: {('torch', name)!r}")


def inputs_of(wire: Wire) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(id, shape, dtype) of everything that a packed graph takes, in order."""
    holders = (node[1:] for node in wire["nodes"] if node[0] == "in")
    return [(str(key), tuple(shape), torch_constant(dtype[1])) for key, shape, dtype in holders]


def communicates(wire: Wire) -> bool:
    """Whether a packed graph exchanges values with other ranks while it runs."""
    return any(n[0] == "call" and n[2].startswith("raypar::convert.") for n in wire["nodes"])


def unpack(wire: Wire, device: torch.device) -> fx.Graph:
    """Rebuilds a graph; placeholders carry fake values on `device`.

    Raises:
        PlanError: A target is not in the allow-list, or the data is malformed.
    """
    try:
        return _unpack(wire, device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PlanError(f"malformed graph data: {type(error).__name__}: {error}") from error


def _unpack(wire: Wire, device: torch.device) -> fx.Graph:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def real(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        kind, inner = value
        if kind == "node":
            return made[inner]
        if kind == "tuple":
            return tuple(real(v) for v in inner)
        if kind == "list":
            return [real(v) for v in inner]
        if kind == "slice":
            return slice(*(real(v) for v in inner))
        if kind == "device":
            return device
        if kind == "torch":
            return torch_constant(inner)
        raise PlanError(f"malformed graph data: {value!r}")

    mode = fake_mode()
    for node in wire["nodes"]:
        if node[0] == "in":
            _, key, shape, dtype = node
            holder = graph.placeholder(f"p{len(made)}")
            with mode:
                where = torch.device("cpu") if key == "rng" else device
                holder.meta = {
                    "id": key,
                    "val": torch.empty(shape, dtype=real(dtype), device=where),
                }
            made.append(holder)
        else:
            _, key, name, args, kwargs, cast = node
            call = graph.call_function(
                find_target(name),
                tuple(real(a) for a in args),
                {_argument(k): real(v) for k, v in kwargs.items()},
            )
            call.meta["id"] = key
            if cast is not None:
                call.meta["autocast"] = (device.type, real(cast[1]), cast[2])
            made.append(call)
    graph.output(real(wire["output"]))
    return graph


def _argument(name: Any) -> str:
    """An argument's name: it becomes part of a program's text, so it may be nothing else."""
    if not isinstance(name, str) or not name.isidentifier():
        raise PlanError(f"malformed graph data: {name!r:.80} is no argument's name")
    return name
