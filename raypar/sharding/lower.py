"""Lowering: a graph and a strategy per op become the graph that one rank runs.

Every op becomes its local call on local parts (`raypar.sharding.local_call`), and between a value
and its readers stand the conversions that bring it into the state each of them asks for: one for
every (value, state), shared by all readers, so that gradients of equal state are summed before
their collective. Autograd over the differentiable `raypar::convert` then gives the right backward
collectives.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.graph.fake_calls import RememberingEmitter, fake_like
from raypar.sharding.convert import NONE, Step, conversion
from raypar.sharding.local_call import write_local
from raypar.sharding.rules.base import OpView, Strategy, is_tensor
from raypar.sharding.spec import RG, P, R, S, ShardingSpec, State, is_shard
from raypar.sharding.strategies import find_strategy, pattern_of, whole

Axes = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Gathered:
    """A parameter that programs take in parts and gather where they read it (ZeRO-3).

    Attributes:
        stored: How it arrives, over `axes`.
        held: How ops then find it, over `axes`.
        axes: All axes of the mesh, the replicas' among them.
    """

    stored: ShardingSpec
    held: ShardingSpec
    axes: tuple[tuple[str, int], ...]


@dataclass
class Lowered:
    """A graph as one rank runs it.

    Attributes:
        graph: Placeholders and outputs as before, of local shape.
        arrivals: Received value → how it lies when the graph takes it.
        departures: Sent value → how it lies when the graph returns it.
    """

    graph: fx.Graph
    arrivals: dict[str, ShardingSpec] = field(default_factory=dict)
    departures: dict[str, ShardingSpec] = field(default_factory=dict)


def assign(
    graph: fx.Graph, sharding: Mapping[str, str], mesh: Sequence[int]
) -> dict[fx.Node, Strategy]:
    """The strategy of every op.

    Args:
        graph: A stage's forward graph; its blocks are annotated (`raypar.sharding.blocks`).
        sharding: Op id, or id pattern, → strategy text (`raypar.plan.StagePlan`).
        mesh: Size of every axis over which ops are sharded.

    Raises:
        PlanError: An op has no such strategy.
    """
    chosen: dict[fx.Node, Strategy] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        key = node.meta["id"]
        text = sharding.get(key) or sharding.get(pattern_of(key))
        chosen[node] = whole(node, len(mesh)) if not text else find_strategy(node, mesh, text)
    return chosen


def readings(graph: fx.Graph, chosen: Mapping[fx.Node, Strategy]) -> dict[str, set[ShardingSpec]]:
    """Placeholder id → the shardings in which ops read it."""
    found: dict[str, set[ShardingSpec]] = {
        n.meta["id"]: set() for n in graph.nodes if n.op == "placeholder"
    }
    for node, strategy in chosen.items():
        for source, wanted in zip(OpView(node).tensors, strategy.inputs, strict=True):
            if source.op == "placeholder":
                found[source.meta["id"]].add(wanted)
    return found


def held_spec(wanted: set[ShardingSpec], n_axes: int) -> ShardingSpec:
    """How a parameter is held for all its readers: per axis what all ask for, else ``Rg``.

    From ``Rg`` every state is reached without communication. A part of a sum (``P``, a bias that
    one rank adds) is read from ``R``: its gradient is whole on every rank.
    """
    states: list[State] = []
    for axis in range(n_axes):
        asked = {R if w[axis] == P else w[axis] for w in wanted}
        states.append(asked.pop() if len(asked) == 1 else RG if asked else R)
    return ShardingSpec(states)


def arrival_spec(wanted: set[ShardingSpec], n_axes: int) -> ShardingSpec:
    """How a received value arrives: per axis cut as all readers ask for, else whole."""
    states: list[State] = []
    for axis in range(n_axes):
        asked = {w[axis] for w in wanted}
        only = asked.pop() if len(asked) == 1 else R
        states.append(only if is_shard(only) else R)
    return ShardingSpec(states)


def departure_spec(made: ShardingSpec, shape: Sequence[int], mesh: Sequence[int]) -> ShardingSpec:
    """How a value leaves: as it was made, with partial sums scattered over a dim that divides."""
    states = list(made)
    for axis, state in enumerate(made):
        if state != P:
            continue
        states[axis] = R
        for dim in range(len(shape)):
            tried = ShardingSpec([*states[:axis], S(dim), *made[axis + 1 :]])
            if tried.fits(shape, mesh):
                states[axis] = S(dim)
                break
    return ShardingSpec(states)


def lower(
    graph: fx.Graph,
    chosen: Mapping[fx.Node, Strategy],
    axes: Axes,
    *,
    held: Mapping[str, ShardingSpec] | None = None,
    gathered: Mapping[str, Gathered] | None = None,
    arriving: Mapping[str, ShardingSpec] | None = None,
    departing: Sequence[str] = (),
) -> Lowered:
    """Writes the local graph.

    Args:
        graph: A stage's forward graph with fake values; its output is one tuple.
        chosen: From `assign`.
        axes: (name, size) of the axes over which ops are sharded.
        held: Parameter name → how the placeholder lies; default: `held_spec` of its readers.
        gathered: Parameters that arrive in parts and are gathered where they are read.
        arriving: Received value → how it lies; default: `arrival_spec` of its readers.
        departing: Ids of the leading outputs, which other stages read; they may stay cut. All
            other outputs are made whole.
    """
    work = _Lowering(graph, chosen, axes, held or {}, gathered or {}, arriving or {})
    return work.run(departing)


class _Lowering:
    def __init__(
        self,
        graph: fx.Graph,
        chosen: Mapping[fx.Node, Strategy],
        axes: Axes,
        held: Mapping[str, ShardingSpec],
        gathered: Mapping[str, Gathered],
        arriving: Mapping[str, ShardingSpec],
    ) -> None:
        self.source = graph
        self.chosen = chosen
        self.axes = axes
        self.mesh = tuple(size for _, size in axes)
        self.held = held
        self.gathered = gathered
        self.arriving = arriving
        self.out = fx.Graph()
        self.anchor = self.out.output(())
        self.emit = RememberingEmitter(self.out, self.anchor)
        self.local: dict[fx.Node, fx.Node] = {}
        self.specs: dict[fx.Node, ShardingSpec] = {}
        self.pieces: dict[fx.Node, tuple[ShardingSpec, ...]] = {}
        self.parts: dict[fx.Node, Gathered] = {}
        self.read_as: dict[tuple[fx.Node, ShardingSpec], fx.Node] = {}
        self.result = Lowered(self.out)

    def run(self, departing: Sequence[str]) -> Lowered:
        wanted = readings(self.source, self.chosen)
        for node in self.source.nodes:
            if node.op == "placeholder":
                self._placeholder(node, wanted[node.meta["id"]])
        for node in self.source.nodes:
            if node.op == "call_function":
                self._call(node)
        output = next(n for n in self.source.nodes if n.op == "output")
        values: tuple[fx.Node, ...] = output.args[0]  # type: ignore[assignment]
        finished = []
        for i, node in enumerate(values):
            self._at(node)
            spec = ShardingSpec.replicated(len(self.axes))
            if i < len(departing) and is_tensor(node.meta["val"]):
                spec = departure_spec(self.specs[node], node.meta["val"].shape, self.mesh)
                self.result.departures[departing[i]] = spec
            finished.append(self._read(node, spec))
        self.out.erase_node(self.anchor)
        self.out.output(tuple(finished))
        return self.result

    def _placeholder(self, node: fx.Node, wanted: set[ShardingSpec]) -> None:
        key: str = node.meta["id"]
        kind, _, name = key.partition(":")
        n_axes = len(self.axes)
        spec = ShardingSpec.replicated(n_axes)
        shape = tuple(node.meta["val"].shape)
        local = shape
        if kind == "param" and name in self.gathered:
            part = self.gathered[name]
            self.parts[node] = part
            local = part.stored.local_shape(shape, [size for _, size in part.axes])
        elif kind == "param":
            spec = self.held[name] if name in self.held else held_spec(wanted, n_axes)
            local = spec.local_shape(shape, self.mesh)
        elif kind == "edge":
            spec = self.arriving[name] if name in self.arriving else arrival_spec(wanted, n_axes)
            local = spec.local_shape(shape, self.mesh)
        if kind == "edge":
            self.result.arrivals[name] = spec
        with self.out.inserting_before(self.anchor):
            holder = self.out.placeholder(node.name)
        value = node.meta["val"]
        holder.meta = {**node.meta, "val": value if local == shape else fake_like(value, local)}
        self.local[node], self.specs[node] = holder, spec

    def _at(self, node: fx.Node) -> None:
        """Says whose call is being written: new nodes take their origin from it."""
        self.anchor.meta = {
            k: node.meta[k] for k in ("module_path", "source", "autocast") if k in node.meta
        }

    def _call(self, node: fx.Node) -> None:
        self._at(node)
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            piece = self.emit(operator.getitem, self.local[source], index)
            self.local[node] = self._finish(piece, node)
            self.specs[node] = self.pieces[source][index]
            return
        strategy = self.chosen[node]
        op = OpView(node)
        wanted = iter(strategy.inputs)

        def local(leaf: fx.Node) -> fx.Node:
            if is_tensor(leaf.meta.get("val")):
                return self._read(leaf, next(wanted))
            return self.local[leaf]

        args: Any = fx.map_arg(node.args, local)
        kwargs: Any = fx.map_arg(node.kwargs, local)
        self._at(node)
        if strategy.whole:
            assert callable(node.target)
            with self.out.inserting_before(self.anchor):
                call = self.out.call_function(node.target, args, kwargs)
            call.meta = dict(node.meta)  # the value that was captured
        else:
            call = self._finish(write_local(op, strategy, self.axes, args, kwargs, self.emit), node)
        self.local[node] = call
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            specs = iter(strategy.outputs)
            whole_spec = ShardingSpec.replicated(len(self.axes))
            self.pieces[node] = tuple(next(specs) if is_tensor(v) else whole_spec for v in value)
        elif strategy.outputs:
            self.specs[node] = strategy.outputs[0]
        else:
            self.specs[node] = ShardingSpec.replicated(len(self.axes))

    def _finish(self, call: fx.Node, node: fx.Node) -> fx.Node:
        """Gives the node that stands for `node` its id, and the helpers in front of it theirs."""
        key = node.meta["id"]
        at, count = call, 0
        call.meta["id"] = key
        while "id" not in at.prev.meta and at.prev.op == "call_function":
            at, count = at.prev, count + 1
            at.meta["id"] = f"{key}~{count}"
        for name in ("seed_key",):
            if name in node.meta:
                call.meta[name] = node.meta[name]
        return call

    def _read(self, node: fx.Node, spec: ShardingSpec) -> fx.Node:
        """The value of `node` in the sharding that a reader asks for."""
        known = self.read_as.get((node, spec))
        if known is not None:
            return known
        if node in self.parts:
            self._gather(node)
        value = self.local[node]
        if is_tensor(node.meta.get("val")):
            steps = conversion(self.specs[node], spec)
            value = self._convert(value, steps, self.axes, f"{node.meta['id']}>{spec}")
        self.read_as[node, spec] = value
        return value

    def _gather(self, node: fx.Node) -> None:
        """Makes a parameter that arrives in parts what its readers expect, at its first reading."""
        part = self.parts.pop(node)
        inner = [i for i, axis in enumerate(part.axes) if axis in self.axes]
        value = self._convert(
            self.local[node], conversion(part.stored, part.held), part.axes, f"{node.meta['id']}>"
        )
        self.local[node] = value
        self.specs[node] = ShardingSpec(part.held[i] for i in inner)

    def _convert(self, value: fx.Node, steps: Sequence[Step], axes: Axes, key: str) -> fx.Node:
        floating = value.meta["val"].is_floating_point() or value.meta["val"].is_complex()
        for i, step in enumerate(steps):
            name, size = axes[step.axis]
            if size == 1 or (step.forward == NONE and not floating):
                continue
            value = self.emit(
                torch.ops.raypar.convert.default,
                value, step.forward, step.backward, step.cut, step.to, name, size,
            )  # fmt: skip
            value.meta.pop("autocast", None)
            value.meta["id"] = f"{key}~{i}"
        return value
