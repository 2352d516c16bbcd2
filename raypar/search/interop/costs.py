"""What every unit costs on a mesh under chosen strategies, at the intra-op program's prices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from raypar.graph.costs import is_view
from raypar.plan import RECOMPUTE_POLICIES
from raypar.search.cost.machine import MeshMachine
from raypar.search.intra.prices import Prices
from raypar.search.intra.settings import Graph, IntraSettings, Value
from raypar.sharding.lower import held_spec
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import ShardingSpec


@dataclass
class UnitCosts:
    """Figures per unit, for one microbatch on one replica.

    Attributes:
        seconds: Recompute policy → forward and backward, collectives included.
        saved: Recompute policy → bytes held from forward to backward.
        largest: Bytes that the largest op touches.
    """

    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    largest: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass
class StateCosts:
    """Figures of the parameters per unit.

    Attributes:
        once: Seconds once a step: gradients summed up, parameters gathered, optimizer.
        microbatch: Seconds that ZeRO-3 adds to every microbatch.
        resident: Bytes of parameters, gradients and optimizer states.
    """

    once: np.ndarray
    microbatch: np.ndarray
    resident: np.ndarray


@dataclass(frozen=True)
class Sharded:
    """A graph with a strategy for every op.

    Attributes:
        graph: The graph as the intra-op program reads it.
        chosen: Its strategies.
        held: Parameter → how programs take it.
        wanted: Value → the shardings in which it is read.
    """

    graph: Graph
    chosen: Mapping[fx.Node, Strategy]
    held: Mapping[Value, ShardingSpec]
    wanted: Mapping[Value, set[ShardingSpec]]

    @classmethod
    def of(cls, graph: Graph, chosen: Mapping[fx.Node, Strategy], n_axes: int) -> Sharded:
        """Works out how values are read."""
        wanted: dict[Value, set[ShardingSpec]] = defaultdict(set)
        for op in graph.ops:
            for value, spec in zip(graph.reads[op], chosen[op].inputs, strict=True):
                wanted[value].add(spec)
        held = {
            value: held_spec(specs, n_axes)
            for value, specs in wanted.items()
            if value.id.startswith("param:")
        }
        return cls(graph, chosen, held, wanted)

    def made(self, value: Value, n_axes: int) -> ShardingSpec:
        """How a value lies where it is made."""
        if value.node.op == "call_function":
            return self.chosen[value.node].outputs[value.index]
        return self.held.get(value) or ShardingSpec.replicated(n_axes)


def unit_costs(
    sharded: Sharded,
    unit_of: Mapping[str, int],
    n_units: int,
    machine: MeshMachine,
    settings: IntraSettings,
    twins: Mapping[fx.Node, fx.Node] | None = None,
) -> UnitCosts:
    """Adds up the ops and conversions of every unit.

    Args:
        sharded: The graph with its strategies.
        unit_of: Op id (and ``param:NAME``) → unit.
        n_units: Number of units.
        machine: The mesh.
        settings: As for the intra-op program; the recompute policy plays no part.
        twins: As for `Prices`.
    """
    found = UnitCosts(largest=np.zeros(n_units))
    for policy in RECOMPUTE_POLICIES:
        prices = Prices(sharded.graph, machine, replace(settings, recompute=policy), twins)
        seconds, saved = np.zeros(n_units), np.zeros(n_units)
        _add_ops(sharded, prices, unit_of, seconds, saved, found.largest)
        n_axes = len(prices.mesh)
        for value, specs in sharded.wanted.items():
            made, unit = sharded.made(value, n_axes), unit_of.get(value.id, 0)
            seconds[unit] += sum(sum(prices.convert(value, made, spec)) for spec in specs)
        found.seconds[policy], found.saved[policy] = seconds, saved
    return found


def _add_ops(
    sharded: Sharded,
    prices: Prices,
    unit_of: Mapping[str, int],
    seconds: np.ndarray,
    saved: np.ndarray,
    largest: np.ndarray,
) -> None:
    kept: dict[tuple[Value, ShardingSpec], int] = {}
    for op in sharded.graph.ops:
        unit, strategy = unit_of[str(op.meta["id"])], sharded.chosen[op]
        price = prices.op(op, strategy)
        seconds[unit] += price.forward_s + price.backward_s
        saved[unit] += price.saved
        reads, makes = sharded.graph.reads[op], sharded.graph.makes[op]
        for position, (value, spec) in enumerate(zip(reads, strategy.inputs, strict=True)):
            if prices.saves_input(op, position):
                kept.setdefault((value, spec), unit)
        if not is_view(op):
            pairs = (*zip(reads, strategy.inputs, strict=True),)
            pairs += (*zip(makes, strategy.outputs, strict=True),)
            touched = math.fsum(prices.local_bytes(v, s) for v, s in pairs)
            largest[unit] = max(largest[unit], touched)
    for (value, spec), unit in kept.items():
        saved[unit] += prices.local_bytes(value, spec)


def state_costs(
    sharded: Sharded,
    unit_of: Mapping[str, int],
    n_units: int,
    machine: MeshMachine,
    settings: IntraSettings,
) -> StateCosts:
    """Adds up the parameters of every unit.

    Args:
        sharded: The graph with its strategies.
        unit_of: ``param:NAME`` → unit.
        n_units: Number of units.
        machine: The mesh, the replicas' axis included.
        settings: ZeRO level, optimizer states, trainable parameters.
    """
    prices = Prices(sharded.graph, machine, settings)
    found = StateCosts(np.zeros(n_units), np.zeros(n_units), np.zeros(n_units))
    for value, held in sharded.held.items():
        price, unit = prices.param(value, held), unit_of[value.id]
        found.once[unit] += price.step_s
        found.microbatch[unit] += price.microbatch_s
        found.resident[unit] += price.resident
    return found
