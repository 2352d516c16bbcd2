"""One call traced alone, with its gradients, as a template that can be written many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.compat import current_graph, fake_mode, is_mutable, make_fx, pytree, storage_id
from raypar.graph.passes.emit import is_op
from raypar.graph.passes.functionalize import functionalize
from raypar.graph.turns import in_turn
from raypar.programs.joint import is_transparent
from raypar.programs.wire import find_target, torch_constant


class Lie(NamedTuple):
    """How a tensor lies in memory: shape, strides and offset in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, value: torch.Tensor) -> Lie:
        """How `value` lies."""
        return cls(tuple(value.shape), value.stride(), int(value.storage_offset()), value.dtype)


class Call(NamedTuple):
    """What the trace of one call depends on.

    Attributes:
        target: Name of the op, as it ships (`raypar.programs.wire`).
        arguments: Positional and keyword arguments as shipped, hashable, with numbers and flags
            next to their types, and ("input", position) for tensors.
        cast: Autocast region that the op was captured in.
        inputs: The distinct tensors among the arguments, and whether each wants a gradient.
        device: Where the op runs.
        tangents: Per result how its gradient lies, None where it has none; empty: forward only.
        arrived: Per input how the gradient lies that it got from later readers; None: none came.
    """

    target: str
    arguments: Any
    cast: Any
    inputs: tuple[tuple[Lie, bool], ...]
    device: torch.device
    tangents: tuple[Lie | None, ...] = ()
    arrived: tuple[Lie | None, ...] = ()


class Made(NamedTuple):
    """How the value of a node comes to be.

    Attributes:
        lie: How it lies.
        source: Node whose storage it shares, and which of its results; None: it has its own.
    """

    lie: Lie
    source: tuple[fx.Node, int] | None


class Step(NamedTuple):
    """One node of a template.

    Attributes:
        node: The node as it was traced; its arguments are nodes of the template.
        made: Its value; for several results one each, None for those that are not tensors.
        several: Whether it has several results.
        transparent: It stands for its first argument, and is not written.
    """

    node: fx.Node
    made: tuple[Made | None, ...]
    several: bool
    transparent: bool


@dataclass(frozen=True)
class Template:
    """A call, traced alone.

    Attributes:
        holders: Placeholders: inputs, then gradients that arrived, then tangents.
        forward: Its forward nodes.
        backward: Its backward nodes, sums with gradients that arrived included.
        outputs: Per result its node, or the position of the input that it is.
        wants: Per result whether it can receive a gradient.
        several: Whether the call gives a tuple.
        gradients: Per input its gradient.
    """

    holders: tuple[fx.Node, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    outputs: tuple[fx.Node | int, ...]
    wants: tuple[bool, ...]
    several: bool
    gradients: tuple[fx.Node | None, ...]


_MOST = 20_000
_known: dict[Call, Template | None] = {}


def template_of(call: Call) -> Template | None:
    """The template of a call; None where a template cannot say what the call does."""
    if call not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[call] = _Tracer(call).trace()
    return _known[call]


def real_arguments(plain: Any, leaf: Callable[[int], Any], device: torch.device) -> Any:
    """Arguments of a `Call` as Python values; `leaf` gives the value of an input."""
    kind, inner = plain

    def each() -> list[Any]:
        return [real_arguments(item, leaf, device) for item in inner]

    if kind == "input":
        return leaf(inner)
    if kind == "list":
        return each()
    if kind == "tuple":
        return tuple(each())
    if kind == "slice":
        return slice(*each())
    if kind == "device":
        return device
    return torch_constant(inner) if kind == "torch" else inner


class _Tracer:
    """Traces one call."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.target = find_target(call.target)
        self.split = 0
        self.wants: tuple[bool, ...] = ()
        self.same: tuple[int, ...] = ()  # per result the input that it is, or -1
        self.tensors: tuple[bool, ...] = ()
        self.several = False

    @in_turn
    def trace(self) -> Template | None:
        """The template, or None."""
        mode = fake_mode()
        call = self.call
        lies = [lie for lie, _ in call.inputs]
        given = [[*lies], [a for a in call.arrived if a], [t for t in call.tangents if t]]

        def run(values: Any, arrived: Any, tangents: Any) -> Any:  # make_fx counts a method's self
            return self._run(values, arrived, tangents)

        with mode:
            values = [[_tensor(lie, call.device) for lie in group] for group in given]
            module = make_fx(run, tracing_mode="real")(*values)
        return self._read(module.graph)

    def _run(
        self,
        values: list[torch.Tensor],
        arrived: list[torch.Tensor],
        tangents: list[torch.Tensor],
    ) -> Any:
        wanting = [wants for _, wants in self.call.inputs]
        leaves = [
            v.detach().requires_grad_(True) if w else v
            for v, w in zip(values, wanting, strict=True)
        ]
        with torch.enable_grad():
            results = self._results(leaves)
        graph = current_graph()
        assert graph is not None
        self.split = len(graph.nodes)
        gradients: list[torch.Tensor | None] = [None] * len(leaves)
        if self.call.tangents:
            roots = [r for r, t in zip(results, self.call.tangents, strict=True) if t]
            # A leaf as a root: what arrived comes first, and the call's own gradient is added.
            roots += [leaf for leaf, a in zip(leaves, self.call.arrived, strict=True) if a]
            found = torch.autograd.grad(
                roots,
                [leaf for leaf, w in zip(leaves, wanting, strict=True) if w],
                [*tangents, *arrived],
                allow_unused=True,
            )
            rest = iter(found)
            gradients = [next(rest) if w else None for w in wanting]
        new = [
            r if isinstance(r, torch.Tensor) and s < 0 else None
            for r, s in zip(results, self.same, strict=True)
        ]
        return new, gradients

    def _results(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        args, kwargs = (
            real_arguments(part, leaves.__getitem__, self.call.device)
            for part in self.call.arguments
        )
        cast = self.call.cast
        if cast is None:
            found = self.target(*args, **dict(kwargs))
        else:
            dtype = None if cast[1] is None else torch_constant(cast[1][1])
            with torch.autocast(
                self.call.device.type, dtype=dtype, enabled=cast[2], cache_enabled=False
            ):
                found = self.target(*args, **dict(kwargs))
        self.several = isinstance(found, (list, tuple))
        results = list(found) if self.several else [found]
        self.same = tuple(next((j for j, x in enumerate(leaves) if x is r), -1) for r in results)
        self.tensors = tuple(isinstance(r, torch.Tensor) for r in results)
        self.wants = tuple(bool(getattr(r, "requires_grad", False)) for r in results)
        return results

    def _read(self, graph: fx.Graph) -> Template | None:
        early = list(graph.nodes)[: self.split]
        if any(_writes(node) for node in early):
            return None
        if any(_writes(node) for node in graph.nodes):
            functionalize(graph, {}, {})
        steps = _steps(graph)
        if steps is None or not all(self.tensors):
            return None
        nodes = list(graph.nodes)
        holders = tuple(n for n in nodes if n.op == "placeholder")
        leaves = pytree.tree_leaves(nodes[-1].args[0], is_leaf=lambda x: x is None)
        results, gradients = leaves[: len(self.same)], leaves[len(self.same) :]
        outputs = tuple(
            same if same >= 0 else node for same, node in zip(self.same, results, strict=True)
        )
        n_forward = self.split - len(holders)
        return Template(
            holders,
            tuple(steps[:n_forward]),
            tuple(steps[n_forward:]),
            outputs,
            self.wants,
            self.several,
            tuple(gradients),
        )


def _tensor(lie: Lie, device: torch.device) -> torch.Tensor:
    made = torch.empty_strided(lie.shape, lie.stride, dtype=lie.dtype, device=device)
    if not lie.offset:
        return made
    size = lie.offset + made.untyped_storage().nbytes() // made.element_size()
    base = torch.empty(size, dtype=lie.dtype, device=device)
    return base.as_strided(lie.shape, lie.stride, lie.offset)


def _writes(node: fx.Node) -> bool:
    return is_op(node) and is_mutable(node.target)  # type: ignore[arg-type]


def _steps(graph: fx.Graph) -> list[Step] | None:
    """The nodes of a template; None where one of them is not a call with fixed sizes."""
    owner: dict[int, tuple[fx.Node, int]] = {}
    steps = []
    for node in graph.nodes:
        if node.op == "output":
            continue
        value = node.meta.get("val")
        several = isinstance(value, (list, tuple))
        made: list[Made | None] = []
        for i, item in enumerate(value if several else [value]):
            if item is None:
                made.append(None)
                continue
            if not isinstance(item, torch.Tensor) or any(type(n) is not int for n in item.shape):
                return None
            storage, lie = storage_id(item), Lie.of(item)
            source = owner.setdefault(storage, (node, i))
            own = source == (node, i)
            if not own and source[0] is node:
                return None
            if own and node.op != "placeholder" and not _plain(item, lie):
                return None
            made.append(Made(lie, None if own else source))
        if node.op == "placeholder":
            continue
        if node.op != "call_function":
            return None
        steps.append(Step(node, tuple(made), several, is_transparent(node)))
    return steps


def _plain(item: torch.Tensor, lie: Lie) -> bool:
    """Whether a tensor fills its storage, as a new one of its strides does."""
    size = torch.empty_strided(lie.shape, lie.stride, dtype=lie.dtype, device="meta")
    return lie.offset == 0 and item.untyped_storage().nbytes() == size.untyped_storage().nbytes()
