"""From a graph with its classes of tied ops to a `raypar.search.intra.problem.Problem`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from raypar.search.intra.borders import arrival_options, held_options, may_arrive, may_hold
from raypar.search.intra.prices import Prices
from raypar.search.intra.problem import Decision, Floats, Link, Problem, Reader
from raypar.search.intra.settings import Graph, Value
from raypar.sharding.lower import departure_spec, held_spec
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import ShardingSpec


@dataclass
class Built:
    """A problem and what its decisions stand for.

    Attributes:
        problem: The numbers.
        classes: The ops of the leading decisions.
        options: Their strategies.
    """

    problem: Problem
    classes: Sequence[Sequence[fx.Node]]
    options: list[Sequence[Strategy]]


def build(
    graph: Graph,
    prices: Prices,
    classes: Sequence[Sequence[fx.Node]],
    options: Mapping[fx.Node, Sequence[Strategy]],
) -> Built:
    """The problem of choosing one strategy for every class of ops."""
    work = _Builder(graph, prices, classes, options)
    work.add_ops()
    work.add_values()
    return Built(
        Problem(work.decisions, work.links), classes, [options[members[0]] for members in classes]
    )


_Use = tuple[int, int]
"""(class of the reading op, position of the argument)."""


class _Builder:
    def __init__(
        self,
        graph: Graph,
        prices: Prices,
        classes: Sequence[Sequence[fx.Node]],
        options: Mapping[fx.Node, Sequence[Strategy]],
    ) -> None:
        self.graph = graph
        self.prices = prices
        self.mesh = prices.mesh
        self.classes = classes
        self.options = [options[members[0]] for members in classes]
        self.class_of = {op: i for i, members in enumerate(classes) for op in members}
        self.decisions: list[Decision] = []
        self.links: list[Link] = []
        self.M = prices.settings.microbatches
        self.flight = prices.settings.in_flight

    def add_ops(self) -> None:
        for members, strategies in zip(self.classes, self.options, strict=True):
            found = [self.prices.op(members[0], s) for s in strategies]
            n = len(members)
            self._decide(
                str(members[0].meta["id"]),
                n,
                np.array([n * self.M * (p.forward_s + p.backward_s) for p in found]),
                np.array([n * self.flight * p.saved for p in found]),
            )

    def _decide(self, name: str, count: int, seconds: Floats, nbytes: Floats) -> int:
        at = len(self.decisions)
        picks = {at: np.arange(len(seconds))}
        self.decisions.append(Decision(name, count, seconds, nbytes, picks))
        return at

    def add_values(self) -> None:
        """One link for every class of values: of one maker, and read by the same classes."""
        uses: dict[Value, dict[_Use, None]] = defaultdict(dict)
        for op in self.graph.ops:
            for position, value in enumerate(self.graph.reads[op]):
                uses[value][self.class_of[op], position] = None
        leaves: dict[Value, set[bool]] = defaultdict(set)
        for value, departs in self.graph.outputs:
            leaves[value].add(departs)
        alike: dict[object, list[Value]] = defaultdict(list)
        for value in dict.fromkeys((*uses, *leaves)):
            maker: object = self.class_of.get(value.node)
            if maker is None:
                kind = value.id.partition(":")[0]
                maker = value.id if kind == "edge" else kind
            form = (value.index, value.form, value in self.graph.flow)
            alike[maker, form, frozenset(uses[value]), frozenset(leaves.get(value, ()))].append(
                value
            )
        for values in alike.values():
            self._add_value(values, list(uses[values[0]]), leaves.get(values[0], set()))

    def _add_value(self, values: list[Value], uses: list[_Use], leaves: set[bool]) -> None:
        value = values[0]
        wanted = list(dict.fromkeys(self._want(u, k) for u in uses for k in self._range(u)))
        if value.node.op == "call_function":
            source = self.class_of[value.node]
            made = [s.outputs[value.index] for s in self.options[source]]
        elif value.id.startswith("param:"):
            if len(uses) == 1:
                self._own_param(values, uses[0])
                return
            source, made = self._shared_param(values, wanted)
        elif value.id.startswith("edge:"):
            source, made = self._arrival(values, wanted)
        else:
            made = [ShardingSpec.replicated(len(self.mesh))]
            source = self._decide(value.id, len(values), np.zeros(1), np.zeros(1))
        targets = self._departures(value, made, leaves)
        self._link(values, source, made, uses, wanted, targets)

    def _range(self, use: _Use) -> range:
        return range(len(self.options[use[0]]))

    def _want(self, use: _Use, option: int) -> ShardingSpec:
        return self.options[use[0]][option].inputs[use[1]]

    def _own_param(self, values: list[Value], use: _Use) -> None:
        """A parameter with one reader is held as that reader asks."""
        decision = self.decisions[use[0]]
        for k in self._range(use):
            want = self._want(use, k)
            held = held_spec({want}, len(self.mesh))
            price = self.prices.param(values[0], held)
            inside = price.microbatch_s + sum(self.prices.convert(values[0], held, want))
            decision.seconds[k] += len(values) * (price.step_s + self.M * inside)
            decision.nbytes[k] += len(values) * price.resident

    def _shared_param(
        self, values: list[Value], wanted: list[ShardingSpec]
    ) -> tuple[int, list[ShardingSpec]]:
        held = held_options(wanted, tuple(values[0].tensor.shape), self.mesh)
        prices = [self.prices.param(values[0], h) for h in held]
        n = len(values)
        source = self._decide(
            values[0].id,
            n,
            np.array([n * (p.step_s + self.M * p.microbatch_s) for p in prices]),
            np.array([n * p.resident for p in prices]),
        )
        return source, held

    def _arrival(
        self, values: list[Value], wanted: list[ShardingSpec]
    ) -> tuple[int, list[ShardingSpec]]:
        value = values[0]
        given = self.prices.settings.arriving.get(value.id.removeprefix("edge:"))
        shape = tuple(value.tensor.shape)
        specs = arrival_options(wanted, shape, self.mesh) if given is None else [given]
        kept = self.prices.settings.recompute != "none"
        held = [self.flight * self.prices.local_bytes(value, s) * kept for s in specs]
        return self._decide(value.id, 1, np.zeros(len(specs)), np.array(held)), specs

    def _departures(
        self, value: Value, made: list[ShardingSpec], leaves: set[bool]
    ) -> list[list[ShardingSpec]]:
        """For every way a value leaves: in which state it does, by the state it is made in."""
        found = []
        if True in leaves:
            shape = tuple(value.tensor.shape)
            found.append([departure_spec(m, shape, self.mesh) for m in made])
        if False in leaves:
            found.append([ShardingSpec.replicated(len(self.mesh))] * len(made))
        return found

    def _link(
        self,
        values: list[Value],
        source: int,
        made: list[ShardingSpec],
        uses: list[_Use],
        wanted: list[ShardingSpec],
        targets: list[list[ShardingSpec]],
    ) -> None:
        value, n = values[0], len(values)
        columns = list(dict.fromkeys([*wanted, *(t for specs in targets for t in specs)]))
        at = {spec: i for i, spec in enumerate(columns)}
        rows = list(dict.fromkeys(made))
        row_of = {spec: i for i, spec in enumerate(rows)}
        cost = self._costs(value, rows, columns) * n
        saved = np.array([n * self.flight * self.prices.local_bytes(value, s) for s in columns])
        readers = [
            Reader(
                u[0],
                np.array([at[self._want(u, k)] for k in self._range(u)]),
                self._saves(u),
            )
            for u in uses
        ]
        states = np.array([row_of[m] for m in made])
        # How a value leaves follows from how it is made: a reader that is the maker itself.
        readers += [Reader(source, np.array([at[t] for t in specs])) for specs in targets]
        self.links.append(Link(value.id, n, source, states, readers, cost, saved))

    def _saves(self, use: _Use) -> bool:
        return self.prices.saves_input(self.classes[use[0]][0], use[1])

    def _costs(self, value: Value, rows: list[ShardingSpec], columns: list[ShardingSpec]) -> Floats:
        cost = self.M * self.prices.table(value, rows, columns)
        kind, _, name = value.id.partition(":")
        together: Callable[[ShardingSpec, ShardingSpec], bool] | None = None
        if value.node.op == "placeholder" and kind == "param":
            together = may_hold
        elif kind == "edge" and name not in self.prices.settings.arriving:
            together = may_arrive
        if together is not None:
            fine = [[together(source, target) for target in columns] for source in rows]
            cost = np.where(np.array(fine), cost, np.inf)
        return cost
