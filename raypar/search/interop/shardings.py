"""How a short graph is sharded on a mesh, and what that costs.

Integer programs are solved once for every microbatch size, mesh shape, and kinds of links and
devices (`_program`); what their choices cost is added up for every mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from raypar.graph.opgraph import OpGraph
from raypar.search.cost.machine import MeshMachine
from raypar.search.interop.costs import Sharded, UnitCosts, unit_costs
from raypar.search.interop.scaled import short_at
from raypar.search.interop.space import Split
from raypar.search.interop.units import Units
from raypar.search.intra.allowed import allow
from raypar.search.intra.forms import take_forms
from raypar.search.intra.planner import OutOfTimeError, plan_intra
from raypar.search.intra.settings import Graph, IntraSettings, read_graph
from raypar.search.intra.ties import twins_of
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules.base import Strategy
from raypar.sharding.strategies import whole

LEAN = "lean"
"""Mode of an axis: free, but what is stored counts as if the step had a single microbatch.

With many microbatches, whole parameters on every device save a little of each of them, and cost
little by the step: what is fastest may hold several times of what would do.
"""


@dataclass
class Short:
    """The short graph of one microbatch size.

    Attributes:
        graph: It.
        read: It as integer programs read it.
        twins: Op → the one that it repeats.
        unit_of: Id of an op or placeholder → its unit; a placeholder's first reader's.
        crossing: Bytes of one microbatch that enter every unit.
    """

    graph: fx.Graph
    read: Graph
    twins: dict[fx.Node, fx.Node]
    unit_of: dict[str, int]
    crossing: np.ndarray


@dataclass
class Sharding:
    """A sharding of a short graph, and what it costs per microbatch.

    Attributes:
        sharded: The chosen strategies.
        costs: Seconds and bytes of every unit.
        texts: Unit → op id → strategy, of ops that do not run whole.
    """

    sharded: Sharded
    costs: UnitCosts
    texts: dict[int, dict[str, str]]


class Shardings:
    """The shardings of a model's short graphs, remembered.

    Args:
        graph: The captured model.
        units: Its units.
        optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).
    """

    def __init__(self, graph: OpGraph, units: Units, optimizer_states: int) -> None:
        self._graph = graph
        self._units = units
        self._optimizer_states = optimizer_states
        self._trainable = frozenset(n for n, (_, _, trained) in graph.params.items() if trained)
        self._short: dict[int, Short] = {}
        self._solved: dict[object, Sharding] = {}
        self._chosen: dict[object, Mapping[str, Strategy]] = {}

    @property
    def solved(self) -> int:
        """How many integer programs were solved."""
        return len(self._chosen)

    def short(self, local_batch: int) -> Short:
        """The short graph at a microbatch size."""
        known = self._short.get(local_batch)
        if known is None:
            graph, members = short_at(self._graph, self._units, local_batch)
            annotate_blocks(graph)
            unit_of = {n.meta["id"]: u for u, ops in enumerate(members) for n in ops}
            for node in graph.find_nodes(op="placeholder"):
                readers = [unit_of[n.meta["id"]] for n in node.users if n.op == "call_function"]
                unit_of[str(node.meta["id"])] = min(readers, default=0)
            share = local_batch / self._graph.global_batch
            crossing = np.array(self._units.crossing[:-1], dtype=float) * share
            read = read_graph(graph, self._trainable)
            known = self._short[local_batch] = Short(graph, read, twins_of(read), unit_of, crossing)
        return known

    def knows(
        self,
        split: Split,
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...] = (),
        *,
        any_kind: bool = False,
    ) -> bool:
        """Whether `find` has no program to solve for this."""
        program = _program(split, modes, machine, forms, any_kind)
        return not machine.mesh.inner or program in self._chosen

    def find(
        self,
        split: Split,
        shape: tuple[int, ...],
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...] = (),
        *,
        any_kind: bool = False,
    ) -> Sharding:
        """The sharding on one mesh shape.

        Args:
            split: How the batch is cut.
            shape: Shape of the mesh without the replicas' axis.
            modes: What the integer program may do on each axis: `raypar.search.intra.allowed`, or
                `LEAN`.
            machine: The mesh.
            forms: What it is told besides (`raypar.search.intra.forms`).
            any_kind: Whether programs of two axes are solved for the first kind of devices that is
                asked for, and decide for all: they take seconds each. That costs 0.6 % of a step
                for Wide-ResNet on A100 and L4, and up to 4 % of a stage.
        """
        links = tuple(
            machine.collective_s(name, "all_reduce", 1e6) for name, _ in machine.mesh.inner
        )
        kinds = tuple(kind.name for kind, _ in machine.kinds)
        forms = forms if shape else ()
        several = split.microbatches > 1  # their gradients are added up
        key = (split.local_batch, several, shape, modes, forms, links, kinds, any_kind)
        known = self._solved.get(key)
        if known is None:
            known = self._solved[key] = self._solve(split, modes, machine, forms, any_kind)
        return known

    def settings(
        self,
        split: Split,
        modes: tuple[str, ...] = (),
        zero: int = 0,
        forms: tuple[tuple[str, str], ...] = (),
    ) -> IntraSettings:
        """What a program is solved with, and costs are added up with."""
        allowed = None if set(modes) <= {"free", LEAN} else allow(modes)
        return IntraSettings(
            microbatches=1 if LEAN in modes else split.microbatches,
            zero=zero,
            optimizer_states=self._optimizer_states,
            allowed=take_forms(forms, allowed) if forms else allowed,
            trainable=self._trainable,
            time_limit_s=30.0,  # they take well under a second; a busy machine may be slow
        )

    def _solve(
        self,
        split: Split,
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...],
        any_kind: bool,
    ) -> Sharding:
        short = self.short(split.local_batch)
        settings = self.settings(split, forms=forms)
        axes = machine.mesh.inner
        found = self._choices(split, modes, machine, forms, any_kind) if axes else {}
        chosen = {
            op: found.get(str(op.meta["id"])) or whole(op, len(axes)) for op in short.read.ops
        }
        sharded = Sharded.of(short.read, chosen, len(axes))
        costs = unit_costs(sharded, short.unit_of, len(self._units), machine, settings, short.twins)
        texts: dict[int, dict[str, str]] = {}
        for op, strategy in chosen.items():
            if any(s != "R" for spec in (*strategy.inputs, *strategy.outputs) for s in spec):
                unit = short.unit_of[op.meta["id"]]
                texts.setdefault(unit, {})[op.meta["id"]] = str(strategy)
        return Sharding(sharded, costs, texts)

    def _choices(
        self,
        split: Split,
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...],
        any_kind: bool,
    ) -> Mapping[str, Strategy]:
        """What the integer program chooses: once for meshes whose axes cross nodes alike.

        How many devices of an axis share a node changes what a collective costs, which is priced
        for each mesh, but seldom what is best to do.
        """
        key = _program(split, modes, machine, forms, any_kind)
        known = self._chosen.get(key)
        if known is None:
            settings = self.settings(split, modes, forms=forms)
            short = self.short(split.local_batch)
            try:
                known = plan_intra(short.graph, machine, settings).choices
            except OutOfTimeError:
                known = {}  # every op runs whole: a poor way, but the others are not lost for it
            self._chosen[key] = known
        return known


def _program(
    split: Split,
    modes: tuple[str, ...],
    machine: MeshMachine,
    forms: tuple[tuple[str, str], ...],
    any_kind: bool,
) -> object:
    """What the choices of an integer program are taken to depend on."""
    axes = machine.mesh.inner
    crossing = tuple(machine.crosses_nodes(name) for name, _ in axes)
    kinds = tuple(sorted(kind.name for kind, _ in machine.kinds))
    told = () if any_kind and len(axes) > 1 else kinds
    return split.local_batch, tuple(n for _, n in axes), modes, forms, crossing, told
