"""The rule contract: what an op may do on one mesh axis.

A rule looks at one op and an axis size and lists the op's `Choice`s: in which state it reads every
tensor, and in which state its results then lie, so that running the *same op on the local parts*
gives the local parts of the result, forward and backward. `R` everywhere is always possible and is
added by itself. Where the local call is not the same call on smaller tensors, the rule also has a
`Localiser` that writes it. `raypar.testing.rules` checks any rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

import raypar.sharding.collectives  # noqa: F401  (registers raypar::convert)
from raypar.compat import argument_names
from raypar.graph.passes.emit import Emitter, bound_args, is_op, op_name
from raypar.sharding.convert import conversion
from raypar.sharding.spec import R, ShardingSpec, State


class Choice(NamedTuple):
    """One way to run an op on one mesh axis.

    Attributes:
        inputs: For every tensor argument (in the order of `OpView.tensors`) its state.
        outputs: For every tensor result its state.
        tag: For the localiser, where the states alone do not say what to do.
    """

    inputs: tuple[State, ...]
    outputs: tuple[State, ...]
    tag: str = ""


def argument_leaves(node: fx.Node) -> list[Any]:
    """What a call is given, lists and tuples taken apart, in call order."""
    found: list[Any] = []

    def collect(value: Any) -> None:  # rules ask often: much faster than a general tree walk
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        else:
            found.append(value)

    collect(node.args)
    collect(node.kwargs)
    return found


@dataclass(frozen=True)
class OpView:
    """An op as rules see it.

    Attributes:
        node: The call, at the size of one microbatch on one replica.
    """

    node: fx.Node

    @cached_property
    def name(self) -> str:
        """``linear`` for ``aten.linear.default``."""
        return op_name(self.node)

    @cached_property
    def bound(self) -> dict[str, Any]:
        """Arguments by schema name, defaults filled in."""
        return bound_args(self.node) if is_op(self.node) else {}

    @cached_property
    def tensors(self) -> tuple[fx.Node, ...]:
        """The tensor arguments in call order; one that is given twice is there twice."""
        leaves = argument_leaves(self.node)
        return tuple(a for a in leaves if isinstance(a, fx.Node) and is_tensor(a.meta.get("val")))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every tensor argument."""
        return tuple(tuple(a.meta["val"].shape) for a in self.tensors)

    def blocks(self, dim: int) -> tuple[int, ...]:
        """Into how many equal blocks a dim of the (first) result may be seen; always holds 1.

        Blocks come from readers that take the dim apart (`raypar.sharding.blocks`).
        """
        return (1, *sorted(self.node.meta.get("blocks", {}).get(dim, ())))

    def input_blocks(self, index: int, dim: int) -> tuple[int, ...]:
        """The same for a dim of a tensor argument, as the op that made it was told."""
        return (1, *sorted(self.tensors[index].meta.get("blocks", {}).get(dim, ())))

    @cached_property
    def results(self) -> tuple[torch.Tensor, ...]:
        """The fake value of every tensor result."""
        value = self.node.meta.get("val")
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(v for v in items if isinstance(v, torch.Tensor))

    @cached_property
    def out(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return tuple(self.results[0].shape)


class Strategy(NamedTuple):
    """One way to run an op on a mesh.

    Attributes:
        inputs: For every tensor argument its sharding.
        outputs: For every tensor result its sharding.
        tags: For every mesh axis the tag of the choice made there.
    """

    inputs: tuple[ShardingSpec, ...]
    outputs: tuple[ShardingSpec, ...]
    tags: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every rank has all of every tensor."""
        return all(state == R for spec in (*self.inputs, *self.outputs) for state in spec)

    def __str__(self) -> str:
        """``S0,R Rg,S1 > S0,P``: inputs, then results."""
        left = " ".join(str(s) for s in self.inputs)
        return f"{left} > {' '.join(str(s) for s in self.outputs)}"


@dataclass
class LocalCall:
    """What a localiser gets: one op, its strategy, and its local inputs.

    Attributes:
        op: The op at full size.
        strategy: How it is to run.
        axes: (name, size) of every mesh axis.
        args: The call's positional arguments with local tensors in place.
        kwargs: The same for keyword arguments.
        emit: Writes nodes: ``emit(target, *args, **kwargs) -> node``.
        mesh: Size of every mesh axis.
    """

    op: OpView
    strategy: Strategy
    axes: Sequence[tuple[str, int]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    emit: Emitter
    mesh: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.mesh = tuple(size for _, size in self.axes)

    def local_out(self, index: int = 0) -> list[int]:
        """Local shape of a result."""
        spec = self.strategy.outputs[index]
        return list(spec.local_shape(tuple(self.op.results[index].shape), self.mesh))

    def same(self) -> fx.Node:
        """The same call on the local inputs."""
        return self.emit(self.op.node.target, *self.args, **self.kwargs)

    def again(self, **changes: Any) -> fx.Node:
        """The same call on the local inputs, with some arguments (by schema name) changed."""
        names = argument_names(self.op.node.target)  # type: ignore[arg-type]
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            at = names.index(name)
            if at < len(args):
                args[at] = value
            else:
                kwargs[name] = value
        return self.emit(self.op.node.target, *args, **kwargs)

    def convert(self, node: fx.Node, source: ShardingSpec, target: ShardingSpec) -> fx.Node:
        """Brings a value that the localiser made from one sharding to another."""
        for step in conversion(source, target):
            name, size = self.axes[step.axis]
            node = self.emit(
                torch.ops.raypar.convert.default,
                node, step.forward, step.backward, step.cut, step.to, name, size,
            )  # fmt: skip
            node.meta.pop("autocast", None)
        return node


Rule = Callable[[OpView, int], Iterable[Choice]]
Localiser = Callable[[LocalCall], fx.Node]
Combination = Callable[[OpView, Strategy, Sequence[int]], bool]

_RULES: dict[str, Rule] = {}
_LOCALISERS: dict[str, Localiser] = {}
_COMBINATIONS: dict[str, Combination] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ops by name (``linear``, ``add``, ``add_``: no overloads).

    Raises:
        ValueError: One of them has a rule already.
    """

    def add(function: Rule) -> Rule:
        for name in names:
            if _RULES.setdefault(name, function) is not function:
                raise ValueError(f"op {name!r} has a sharding rule already")
        return function

    return add


def localiser(*names: str) -> Callable[[Localiser], Localiser]:
    """Registers how the local call of ops is written, where it is not the same call.

    Raises:
        ValueError: One of them has a localiser already.
    """

    def add(function: Localiser) -> Localiser:
        for name in names:
            if _LOCALISERS.setdefault(name, function) is not function:
                raise ValueError(f"op {name!r} has a localiser already")
        return function

    return add


def combination(*names: str) -> Callable[[Combination], Combination]:
    """Registers which strategies over several axes an op has: ``(op, strategy, mesh) -> bool``.

    For ops whose choices are each right alone and may be wrong together, as the groups of a
    convolution, which must divide by all axes that cut them. That tensors divide is checked anyway.

    Raises:
        ValueError: One of them has such a check already.
    """

    def add(function: Combination) -> Combination:
        for name in names:
            if _COMBINATIONS.setdefault(name, function) is not function:
                raise ValueError(f"op {name!r} has a check of its combinations already")
        return function

    return add


def find_combination(name: str) -> Combination | None:
    """The check of an op's strategies over several axes, if it has one."""
    _load()
    return _COMBINATIONS.get(name)


def find_rule(name: str) -> Rule | None:
    """The rule of an op, if it has one."""
    _load()
    return _RULES.get(name)


def find_localiser(name: str) -> Localiser | None:
    """The localiser of an op, if it has one."""
    _load()
    return _LOCALISERS.get(name)


def is_tensor(value: Any) -> bool:
    """Whether a value is one tensor."""
    return isinstance(value, torch.Tensor)


def _load() -> None:
    from raypar.sharding.rules import ALL  # noqa: F401  (every file registers its rules)
