"""The joint trace of a stage, put together from traces of its single calls.

`raypar.programs.joint.trace_joint` runs a whole stage under autograd. A planner asks for hundreds
of stages that are made of the same few calls; here every distinct call (op, arguments, how its
tensors lie, what wants a gradient) is traced once, alone, and a stage is written from these
templates. The result is the whole trace, node by node and in the same order:

* Autograd runs backward nodes in descending order of their creation, whatever the roots are: a node
  is ready when all that were made of its results have run, and these are younger. Calls are made
  one after the other, so that the backward nodes of one call follow each other.
* Where a value has several readers, each new gradient is added to what has arrived, as soon as the
  backward node that made it has ended. A template is traced with what has arrived before, so that
  it holds this sum at its place.

What templates cannot say makes `stitch_joint` give None: sizes that depend on data, constants that
a trace lifts, in-place writes of a forward pass, gradients that autograd leaves undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.graph.passes.emit import drop_unused
from raypar.programs._op_template import Call, Lie, Made, Step, Template, template_of
from raypar.programs.joint import Joint
from raypar.programs.recurrent import KINDS
from raypar.programs.wire import Wire, torch_constant

_GETITEM = "operator.getitem"


class _Unsaid(Exception):
    """Templates cannot say this stage."""


class _Value:
    """A tensor of the stage.

    Attributes:
        node: The node that holds it.
        val: Its size, strides and storage, as a meta tensor.
        wants: Whether it can receive a gradient.
        grad: Sum of the gradients that have arrived.
    """

    __slots__ = ("grad", "node", "val", "wants")

    def __init__(self, node: fx.Node, val: torch.Tensor, wants: bool = False) -> None:
        self.node = node
        self.val = val
        self.wants = wants
        self.grad: _Value | None = None


class _Made(NamedTuple):
    """A call that was written.

    Attributes:
        call: What it is.
        inputs: Its distinct tensors.
        results: What it made; None for what is one of its inputs.
        nodes: Per forward step the node it stands for, and its value.
    """

    call: Call
    inputs: tuple[_Value, ...]
    results: tuple[_Value | None, ...]
    nodes: list[tuple[fx.Node, Any]]


def stitch_joint(
    wire: Wire, wrt: Sequence[int], candidates: Sequence[int], device: torch.device
) -> Joint | None:
    """What `raypar.programs.joint.trace_joint` gives for a shipped stage, or None.

    Values of its nodes are meta tensors: equal in size, strides and in what shares a storage.

    Args:
        wire: The stage's forward graph as shipped.
        wrt: Positions of the placeholders to differentiate.
        candidates: Positions of the outputs that may receive a gradient.
        device: Where the stage runs.
    """
    try:
        with torch.no_grad():
            return _Stitcher(device).stitch(wire, list(wrt), candidates)
    except _Unsaid:
        return None


_MOST_MET = 50_000
_met: set[str] = set()


def worth_stitching(wire: Wire) -> bool:
    """Whether most calls of a shipped stage repeat others, of it or of stages asked for before.

    A template takes about as long as its call in a whole trace: it pays from the second time on.
    """
    calls = [node for node in wire["nodes"] if node[0] == "call"]
    if len(_met) > _MOST_MET:
        _met.clear()
    new = {f"{target}{_shape(args)}{_shape(kwargs)}" for _, _, target, args, kwargs, _ in calls}
    new -= _met
    _met.update(new)
    return 2 * len(new) <= len(calls)


def _shape(value: Any) -> str:
    """Shipped arguments as text, without which nodes they are."""
    if isinstance(value, tuple) and value[0] == "node":
        return "node"
    if isinstance(value, tuple) and value[0] in ("list", "tuple"):
        return _shape(value[1])
    if isinstance(value, list):
        return "[" + ",".join(map(_shape, value)) + "]"
    if isinstance(value, dict):
        return "".join(f"{key}={_shape(item)}" for key, item in value.items())
    return repr(value)


class _Stitcher:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = fx.Graph()
        self.env: list[Any] = []  # per shipped node its `_Value`, or a tuple of them
        self.made: list[_Made] = []

    def stitch(self, wire: Wire, wrt: list[int], candidates: Sequence[int]) -> Joint:
        """The whole joint graph."""
        shipped = wire["nodes"]
        inputs = self._inputs(shipped, set(wrt))
        _, places = wire["output"]
        # Placeholders come first; how many tangents there are is known after forward.
        last = inputs[-1].node
        for node in shipped:
            if node[0] == "call":
                self.env.append(self._forward(node))
        outputs = [self._output(place) for place in places]
        differentiated = [i for i in candidates if outputs[i].wants]
        tangents: list[_Value] = []
        for i in differentiated:
            val = outputs[i].val
            tangent = torch.empty(val.shape, dtype=val.dtype, device="meta")
            with self.graph.inserting_after(last):
                last = self._holder(f"tangents_{len(tangents)}", tangent)
            tangents.append(_Value(last, tangent))
        if wrt and tangents:
            self._roots([outputs[i] for i in differentiated], tangents)
            for made in reversed(self.made):
                self._backward(made)
        results = [value.node for value in outputs]
        gradients = [_node_of(inputs[i].grad) for i in wrt]
        self.graph.output([*results, *gradients])
        drop_unused(self.graph)
        holders = [value.node for value in inputs]
        return Joint(
            self.graph,
            holders,
            [value.node for value in tangents],
            differentiated,
            list(results),
            gradients,
            wrt,
            {},
        )

    def _holder(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _inputs(self, shipped: Sequence[Any], wrt: set[int]) -> list[_Value]:
        """The placeholders; they lead the list."""
        found: list[_Value] = []
        for node in shipped:
            if node[0] != "in":
                continue
            _, _, shape, dtype = node
            value = torch.empty(shape, dtype=torch_constant(dtype[1]), device="meta")
            holder = self._holder(f"values_{len(found)}", value)
            found.append(_Value(holder, value, len(found) in wrt))
        if len(found) == 0 or any(node[0] == "in" for node in shipped[len(found) :]):
            raise _Unsaid
        self.env += found
        return found

    def _output(self, place: Any) -> _Value:
        value = self.env[place[1]] if isinstance(place, tuple) and place[0] == "node" else None
        if not isinstance(value, _Value):
            raise _Unsaid
        return value

    # -- forward ----------------------------------------------------------------------------

    def _forward(self, node: Any) -> Any:
        """Writes one call; gives its result or results."""
        _, _, target, args, kwargs, cast = node
        if target == _GETITEM and isinstance(args[0], tuple) and args[0][0] == "node":
            source = self.env[args[0][1]]
            if isinstance(source, tuple) and isinstance(args[1], int):
                return source[args[1]]
        if target.split("::")[-1].split(".")[0] in KINDS:
            raise _Unsaid
        slots: dict[_Value, int] = {}
        arguments = (
            ("list", tuple(self._plain(a, slots) for a in args)),
            ("tuple", tuple(self._pair(k, a, slots) for k, a in kwargs.items())),
        )
        inputs = tuple(slots)
        call = Call(
            target,
            arguments,
            cast,
            tuple((Lie.of(value.val), value.wants) for value in inputs),
            self.device,
        )
        template = _said(template_of(call))
        env = self._given(template, inputs)
        nodes = [self._write(step, env) for step in template.forward]
        results: list[_Value] = []
        new: list[_Value | None] = []
        for at, wants in zip(template.outputs, template.wants, strict=True):
            if isinstance(at, int):
                results.append(inputs[at])
                new.append(None)
            else:
                value = _Value(*env[at], wants)
                results.append(value)
                new.append(value)
        self.made.append(_Made(call, inputs, tuple(new), nodes))
        return tuple(results) if template.several else results[0]

    def _plain(self, value: Any, slots: dict[_Value, int]) -> Any:
        """A shipped argument as a part of a `Call`."""
        if not isinstance(value, tuple):
            return type(value).__name__, value  # 1, 1.0 and True are equal keys
        kind, inner = value
        if kind == "node":
            found = self.env[inner]
            if not isinstance(found, _Value):
                raise _Unsaid
            return "input", slots.setdefault(found, len(slots))
        if kind in ("list", "tuple", "slice"):
            return kind, tuple(self._plain(item, slots) for item in inner)
        return value

    def _pair(self, key: str, value: Any, slots: dict[_Value, int]) -> Any:
        return "tuple", (("str", key), self._plain(value, slots))

    # -- backward ---------------------------------------------------------------------------

    def _roots(self, outputs: Sequence[_Value], tangents: Sequence[_Value]) -> None:
        """What arrives from outside, before any backward node has run."""
        for value, tangent in zip(outputs, tangents, strict=True):
            if value.grad is not None:
                raise _Unsaid  # one value in two places
            value.grad = tangent

    def _backward(self, made: _Made) -> None:
        arrived = [None if r is None else r.grad for r in made.results]
        if all(grad is None for grad in arrived):
            return
        tangents = tuple(None if g is None else Lie.of(g.val) for g in arrived)
        before = tuple(
            None if v.grad is None or not v.wants else Lie.of(v.grad.val) for v in made.inputs
        )
        template = _said(template_of(made.call._replace(tangents=tangents, arrived=before)))
        if len(template.forward) != len(made.nodes):
            raise _Unsaid
        sums = [v.grad for v, lie in zip(made.inputs, before, strict=True) if lie is not None]
        env = self._given(template, [*made.inputs, *sums, *(g for g in arrived if g is not None)])
        for step, written in zip(template.forward, made.nodes, strict=True):
            env[step.node] = written
        for step in template.backward:
            self._write(step, env)
        for value, node in zip(made.inputs, template.gradients, strict=True):
            if node is not None:
                value.grad = _Value(*env[node])
            elif value.wants:
                raise _Unsaid

    # -- writing ----------------------------------------------------------------------------

    def _given(
        self, template: Template, values: Sequence[_Value | None]
    ) -> dict[fx.Node, tuple[fx.Node, Any]]:
        pairs = [(value.node, value.val) for value in values if value is not None]
        return dict(zip(template.holders, pairs, strict=True))

    def _write(self, step: Step, env: dict[fx.Node, tuple[fx.Node, Any]]) -> tuple[fx.Node, Any]:
        """Writes one node of a template."""
        traced = step.node
        made = [None if m is None else _value_of(m, env) for m in step.made]
        val = tuple(made) if step.several else made[0]
        if step.transparent:
            found = env[traced] = (env[traced.args[0]][0], val)  # type: ignore[index]
            return found
        node = self.graph.create_node(
            "call_function",
            traced.target,
            fx.map_arg(traced.args, lambda n: env[n][0]),  # type: ignore[arg-type]
            fx.map_arg(traced.kwargs, lambda n: env[n][0]),  # type: ignore[arg-type]
        )
        node.meta["val"] = val
        found = env[traced] = (node, val)
        return found


def _value_of(made: Made, env: dict[fx.Node, tuple[fx.Node, Any]]) -> torch.Tensor:
    shape, stride, offset, dtype = made.lie
    if made.source is None:
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    source, place = made.source
    base: Any = env[source][1]
    base = base[place] if isinstance(base, tuple) else base
    if base.dtype == dtype:
        view: torch.Tensor = base.as_strided(shape, stride, offset)
        return view
    empty = torch.empty(0, dtype=dtype, device="meta")
    return empty.set_(base.untyped_storage(), offset, shape, stride)


def _node_of(value: _Value | None) -> fx.Node | None:
    return None if value is None else value.node


def _said(template: Template | None) -> Template:
    if template is None:
        raise _Unsaid
    return template
