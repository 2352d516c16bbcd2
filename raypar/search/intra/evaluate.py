"""What given strategies cost, op by op and value by value, without any program or tie.

The same prices as the search, put together independently: the check of everything between.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from raypar.graph.build import CleanGraph
from raypar.programs.slicing import StageGraph
from raypar.search.cost.machine import MeshMachine
from raypar.search.intra.prices import Prices
from raypar.search.intra.settings import Graph, IntraSettings, Value, read_graph
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.lower import arrival_spec, departure_spec, held_spec
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import ShardingSpec
from raypar.sharding.strategies import whole


@dataclass(frozen=True)
class Estimate:
    """What an assignment costs one device.

    Attributes:
        seconds: Of a step, pipeline bubbles and borders to other stages aside.
        nbytes: Held at most.
        parts: Seconds by kind: ``compute``, ``convert`` (activations), ``params`` (gather,
            gradient sync and optimizer); they add up to `seconds`.
        holds: Bytes by kind: ``params`` (with gradients and optimizer states) and ``saved``; they
            add up to `nbytes`.
        largest: The tensors that hold most, largest first: (id, bytes).
    """

    seconds: float
    nbytes: float
    parts: dict[str, float] = field(default_factory=dict)
    holds: dict[str, float] = field(default_factory=dict)
    largest: tuple[tuple[str, float], ...] = ()


def evaluate(
    source: CleanGraph | StageGraph | fx.Graph,
    choices: Mapping[str, Strategy],
    machine: MeshMachine,
    settings: IntraSettings | None = None,
) -> Estimate:
    """What a graph costs with given strategies.

    Args:
        source: A whole model or a stage, at the size of one microbatch on one replica.
        choices: Op id → strategy; an op without one is whole on every rank.
        machine: The mesh.
        settings: Microbatches, memory policy and so on; its limits and filters play no part.
    """
    settings = settings or IntraSettings()
    annotate_blocks(source if isinstance(source, fx.Graph) else source.graph)
    graph = read_graph(source, settings.trainable)
    return estimate(graph, Prices(graph, machine, settings), choices)


def estimate(graph: Graph, prices: Prices, choices: Mapping[str, Strategy]) -> Estimate:
    """`evaluate` for a graph that was read already."""
    return _Evaluation(graph, prices, choices).run()


class _Evaluation:
    def __init__(self, graph: Graph, prices: Prices, choices: Mapping[str, Strategy]) -> None:
        self.graph = graph
        self.prices = prices
        self.settings = prices.settings
        n = len(prices.mesh)
        self.chosen = {op: choices.get(str(op.meta["id"])) or whole(op, n) for op in graph.ops}
        self.seconds: dict[str, list[float]] = {"compute": [], "convert": [], "params": []}
        self.saved: dict[tuple[str, str], float] = {}
        self.resident: dict[str, float] = {}

    def run(self) -> Estimate:
        wanted: dict[Value, set[ShardingSpec]] = defaultdict(set)
        kept: set[tuple[Value, ShardingSpec]] = set()
        M, flight = self.settings.microbatches, self.settings.in_flight
        for op in self.graph.ops:
            strategy = self.chosen[op]
            price = self.prices.op(op, strategy)
            self.seconds["compute"].append(M * (price.forward_s + price.backward_s))
            self.saved[str(op.meta["id"]), "result"] = flight * price.saved
            pairs = zip(self.graph.reads[op], strategy.inputs, strict=True)
            for position, (value, want) in enumerate(pairs):
                wanted[value].add(want)
                if self.prices.saves_input(op, position):
                    kept.add((value, want))
        made = {v: self._made(v, wanted[v]) for v in [*wanted, *(v for v, _ in self.graph.outputs)]}
        for value, departs in self.graph.outputs:
            shape = tuple(value.tensor.shape)
            spec = ShardingSpec.replicated(len(self.prices.mesh))
            if departs:
                spec = departure_spec(made[value], shape, self.prices.mesh)
            wanted[value].add(spec)
        for value, specs in wanted.items():
            for spec in specs:
                seconds = M * sum(self.prices.convert(value, made[value], spec))
                self.seconds["convert"].append(seconds)
        for value, spec in kept:
            nbytes = flight * self.prices.local_bytes(value, spec)
            self.saved[value.id, f"{value.index}{spec}"] = nbytes
        return self._result()

    def _made(self, value: Value, wanted: set[ShardingSpec]) -> ShardingSpec:
        """How a value lies, and what having it so costs."""
        n = len(self.prices.mesh)
        if value.node.op == "call_function":
            return self.chosen[value.node].outputs[value.index]
        kind, _, name = value.id.partition(":")
        if kind == "param" and wanted:
            held = held_spec(wanted, n)
            price = self.prices.param(value, held)
            step = price.step_s + self.settings.microbatches * price.microbatch_s
            self.seconds["params"].append(step)
            self.resident[value.id] = price.resident
            return held
        if kind == "edge":
            spec = self.settings.arriving.get(name) or arrival_spec(wanted, n)
            if self.settings.recompute != "none":
                local = self.prices.local_bytes(value, spec)
                self.saved[value.id, "arrives"] = self.settings.in_flight * local
            return spec
        return ShardingSpec.replicated(n)

    def _result(self) -> Estimate:
        parts = {kind: math.fsum(values) for kind, values in self.seconds.items()}
        holds = {
            "params": math.fsum(self.resident.values()),
            "saved": math.fsum(self.saved.values()),
        }
        tensors: dict[str, float] = defaultdict(float, self.resident)
        for (name, _), nbytes in self.saved.items():
            tensors[name] += nbytes
        largest = sorted(tensors.items(), key=lambda item: -item[1])[:8]
        return Estimate(
            math.fsum(parts.values()), math.fsum(holds.values()), parts, holds, tuple(largest)
        )
