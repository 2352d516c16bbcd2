"""Ways to run units on a mesh: a sharding for every mesh shape, then ZeRO levels and recomputation.

Shardings come from the intra-op integer program on the short graph, once for every microbatch
size, mesh shape and kind of link; ZeRO and recomputation only change what is added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import fx

from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, RECOMPUTE_POLICIES, MeshSlice
from raypar.search.config import SearchConfig
from raypar.search.cost.machine import MeshMachine, machine_of, p2p_s
from raypar.search.interop.costs import (
    Sharded,
    StateCosts,
    UnitCosts,
    state_costs,
    unit_costs,
)
from raypar.search.interop.pipeline import Way
from raypar.search.interop.scaled import short_at
from raypar.search.interop.space import AXIS_NAMES, Split, mesh_shapes
from raypar.search.interop.units import Units
from raypar.search.intra.allowed import allow
from raypar.search.intra.forms import take_forms
from raypar.search.intra.planner import OutOfTimeError, plan_intra
from raypar.search.intra.settings import Graph, IntraSettings, read_graph
from raypar.search.intra.ties import twins_of
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules.base import Strategy
from raypar.sharding.strategies import whole


@dataclass(frozen=True)
class Wish:
    """Which ways are asked for.

    Attributes:
        modes: What the integer program may do on every axis (`raypar.search.intra.allowed`); None:
            the usual ones, one after the other.
        forms: (parameter pattern, form): how the ops that read such parameters are cut
            (`raypar.search.intra.forms`); all other ops are free.
        recompute: The recompute policy; ``auto``: every one.
        zero: The ZeRO level; ``auto``: every one that can pay.
        axes: Most axes that a mesh may have besides the replicas'; None: any number.
    """

    modes: str | None = None
    forms: tuple[tuple[str, str], ...] = ()
    recompute: str = "auto"
    zero: int | Literal["auto"] = "auto"
    axes: int | None = None


ANY = Wish()
LEAN = "lean"
"""Mode of an axis: free, but what is stored counts as if the step had a single microbatch.

With many microbatches, whole parameters on every device save a little of each of them, and cost
little by the step: what is fastest may hold several times of what would do.
"""
_TIGHT = 0.5
"""Of the memory of all stages: where the fastest shardings store more, lean ones are looked at."""


@dataclass(frozen=True)
class WayKey:
    """What a way is.

    Attributes:
        shape: Shape of the stage's mesh without the replicas' axis.
        modes: What the integer program was free to do on each axis.
        forms: What it was told besides; see `Wish`.
        zero: ZeRO level.
        recompute: Recompute policy.
        sharding: Unit that stands for others → op id → strategy text.
    """

    shape: tuple[int, ...]
    modes: tuple[str, ...]
    forms: tuple[tuple[str, str], ...]
    zero: int
    recompute: str
    sharding: Mapping[int, Mapping[str, str]]


@dataclass
class _Short:
    """The short graph of one microbatch size."""

    graph: fx.Graph
    read: Graph
    twins: dict[fx.Node, fx.Node]
    unit_of: dict[str, int]
    crossing: np.ndarray


@dataclass
class _Solved:
    """A sharding of a short graph, and what it costs per microbatch."""

    sharded: Sharded
    costs: UnitCosts
    texts: dict[int, dict[str, str]]


class WayMaker:
    """Makes and remembers ways.

    Args:
        graph: The captured model.
        cluster: The devices.
        calibration: What they reach; None: the device table.
        config: Options that fix or limit ways.
        units: The model's units.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        calibration: Calibration | None,
        config: SearchConfig,
        units: Units,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.calibration = calibration
        self.config = config
        self.units = units
        self._trainable = frozenset(n for n, (_, _, trained) in graph.params.items() if trained)
        self._short: dict[int, _Short] = {}
        self._solved: dict[object, _Solved] = {}
        self._chosen: dict[object, Mapping[str, Strategy]] = {}

    @property
    def solved(self) -> int:
        """How many integer programs were solved."""
        return len(self._chosen)

    @property
    def most_axes(self) -> int:
        """Axes that a mesh may have besides the replicas'."""
        sizes = range(1, 1 + max(node.devices for node in self.cluster.nodes))
        return max(len(shape) for size in sizes for shape in self._shapes(size))

    def like(self, config: SearchConfig, cluster: Cluster | None = None) -> WayMaker:
        """One for other options that knows every sharding that this one knows, and shares more.

        Args:
            config: Options with the same number of optimizer states.
            cluster: Another cluster of the same kinds of devices and the same calibration.
        """
        assert config.optimizer_states == self.config.optimizer_states
        other = copy(self)
        other.config = config
        other.cluster = cluster or self.cluster
        return other

    def ways(self, split: Split, size: int, devices: Sequence[int], wish: Wish = ANY) -> list[Way]:
        """Every way to run a stage of `size` devices per replica.

        Args:
            split: How the batch is cut.
            size: Devices of one replica.
            devices: The ``replicas * size`` devices, replica by replica.
            wish: Which ways; fixed options of the config hold besides.
        """
        found: list[Way] = []
        for shape in self._shapes(size):
            if wish.axes is not None and len(shape) > wish.axes:
                continue
            mesh = MeshSlice(
                tuple(devices), (split.replicas, *shape), (DATA, *AXIS_NAMES[: len(shape)])
            )
            machine = machine_of(self.cluster, mesh, self.calibration)
            wanted = _modes(shape) if wish.modes is None else [(wish.modes,) * len(shape)]
            if wish.modes is None and len(shape) == 1 and self._is_tight(split, size, machine):
                wanted.append((LEAN,))
            for modes in wanted:
                solved = self._shard(split, shape, modes, machine, wish.forms)
                for zero in self._zeros(split.replicas * size, wish):
                    state = self._state(split, solved, machine, zero)
                    key = WayKey(shape, modes, wish.forms, zero, "", solved.texts)
                    found += self._assemble(split, size, machine, key, solved, state, wish)
        return found

    def _is_tight(self, split: Split, size: int, machine: MeshMachine) -> bool:
        """Whether the fastest sharding over one axis may store more than stages have room for."""
        solved = self._shard(split, (size,), ("free",), machine)
        state = self._state(split, solved, machine, zero=min(1, split.replicas * size - 1))
        stored = float(state.resident[np.asarray(self.units.twin)].sum())
        return stored > _TIGHT * self._room(machine) * (split.devices // size)

    def _room(self, machine: MeshMachine) -> float:
        memory = machine.memory_bytes * self.config.memory_fraction
        return memory - machine.reserved_bytes(machine.memory_bytes)

    def alone_s(self, split: Split, device: int) -> np.ndarray:
        """Per unit, seconds of one microbatch on a device for itself, nothing recomputed.

        Zero where rates fall beyond a size of an op, so that parts may be faster than the whole.
        """
        mesh = MeshSlice((device,), (1,), (DATA,))
        machine = machine_of(self.cluster, mesh, self.calibration)
        curves = [curve for _, rates in machine.kinds for curve in rates.memory.values()]
        if any(curve.near > curve.far for curve in curves):
            return np.zeros(len(self.units))
        seconds = self._shard(split, (), (), machine).costs.seconds["none"]
        return seconds[np.asarray(self.units.twin)]

    def sharding(
        self, split: Split, shape: tuple[int, ...], modes: tuple[str, ...], devices: Sequence[int]
    ) -> Mapping[int, Mapping[str, str]]:
        """The sharding on one mesh shape; see `WayKey.sharding`."""
        mesh = MeshSlice(
            tuple(devices), (split.replicas, *shape), (DATA, *AXIS_NAMES[: len(shape)])
        )
        machine = machine_of(self.cluster, mesh, self.calibration)
        return self._shard(split, shape, modes, machine).texts

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        per_node = max(node.devices for node in self.cluster.nodes)
        if self.config.tensor != "auto":
            return [(size,)] if size > 1 else [()]
        return mesh_shapes(size, per_node)

    def _zeros(self, devices: int, wish: Wish) -> tuple[int, ...]:
        if self.config.zero != "auto":
            return (self.config.zero,)
        if devices == 1:
            return (0,)  # there is nobody to share with
        return (0, 1, 2, 3) if wish.zero == "auto" else (wish.zero,)

    def short(self, local_batch: int) -> _Short:
        """The short graph at a microbatch size."""
        known = self._short.get(local_batch)
        if known is None:
            graph, members = short_at(self.graph, self.units, local_batch)
            annotate_blocks(graph)
            unit_of = {n.meta["id"]: u for u, ops in enumerate(members) for n in ops}
            for node in graph.find_nodes(op="placeholder"):
                readers = [unit_of[n.meta["id"]] for n in node.users if n.op == "call_function"]
                unit_of[str(node.meta["id"])] = min(readers, default=0)
            share = local_batch / self.graph.global_batch
            crossing = np.array(self.units.crossing[:-1], dtype=float) * share
            read = read_graph(graph, self._trainable)
            known = self._short[local_batch] = _Short(
                graph, read, twins_of(read), unit_of, crossing
            )
        return known

    def _shard(
        self,
        split: Split,
        shape: tuple[int, ...],
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...] = (),
    ) -> _Solved:
        links = tuple(
            machine.collective_s(name, "all_reduce", 1e6) for name, _ in machine.mesh.inner
        )
        kinds = tuple(kind.name for kind, _ in machine.kinds)
        forms = forms if shape else ()
        several = split.microbatches > 1  # their gradients are added up
        key = (split.local_batch, several, shape, modes, forms, links, kinds)
        known = self._solved.get(key)
        if known is None:
            known = self._solved[key] = self._solve(split, modes, machine, forms)
        return known

    def _settings(
        self,
        split: Split,
        modes: tuple[str, ...] = (),
        zero: int = 0,
        forms: tuple[tuple[str, str], ...] = (),
    ) -> IntraSettings:
        allowed = None if set(modes) <= {"free", LEAN} else allow(modes)
        return IntraSettings(
            microbatches=1 if LEAN in modes else split.microbatches,
            zero=zero,
            optimizer_states=self.config.optimizer_states,
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
    ) -> _Solved:
        short = self.short(split.local_batch)
        settings = self._settings(split, forms=forms)
        axes = machine.mesh.inner
        found = self._choices(split, modes, machine, forms) if axes else {}
        chosen = {
            op: found.get(str(op.meta["id"])) or whole(op, len(axes)) for op in short.read.ops
        }
        sharded = Sharded.of(short.read, chosen, len(axes))
        costs = unit_costs(sharded, short.unit_of, len(self.units), machine, settings, short.twins)
        texts: dict[int, dict[str, str]] = {}
        for op, strategy in chosen.items():
            if any(s != "R" for spec in (*strategy.inputs, *strategy.outputs) for s in spec):
                unit = short.unit_of[op.meta["id"]]
                texts.setdefault(unit, {})[op.meta["id"]] = str(strategy)
        return _Solved(sharded, costs, texts)

    def _choices(
        self,
        split: Split,
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...],
    ) -> Mapping[str, Strategy]:
        """What the integer program chooses: once for meshes whose axes cross nodes alike.

        How many devices of an axis share a node changes what a collective costs, which is priced
        for each mesh, but seldom what is best to do.
        """
        axes = machine.mesh.inner
        crossing = tuple(machine.crosses_nodes(name) for name, _ in axes)
        kinds = tuple(sorted(kind.name for kind, _ in machine.kinds))
        key = (split.local_batch, tuple(n for _, n in axes), modes, forms, crossing, kinds)
        known = self._chosen.get(key)
        if known is None:
            settings = self._settings(split, modes, forms=forms)
            short = self.short(split.local_batch)
            try:
                known = plan_intra(short.graph, machine, settings).choices
            except OutOfTimeError:
                known = {}  # every op runs whole: a poor way, but the others are not lost for it
            self._chosen[key] = known
        return known

    def _state(self, split: Split, solved: _Solved, machine: MeshMachine, zero: int) -> StateCosts:
        short = self.short(split.local_batch)
        settings = self._settings(split, zero=zero)
        return state_costs(solved.sharded, short.unit_of, len(self.units), machine, settings)

    def _assemble(
        self,
        split: Split,
        size: int,
        machine: MeshMachine,
        like: WayKey,
        solved: _Solved,
        state: StateCosts,
        wish: Wish,
    ) -> list[Way]:
        costs, short = solved.costs, self.short(split.local_batch)
        entry = self._entry(short.crossing / size, machine)
        fixed_policies = [p for p in (self.config.recompute, wish.recompute) if p != "auto"]
        policies = fixed_policies[:1] or list(RECOMPUTE_POLICIES)
        found = []
        for policy in policies:
            seconds = costs.seconds[policy] + state.microbatch
            # A whole forward pass is made again before backward: all of it is held for a moment.
            again = costs.saved["none"] if policy == "full" else 0.0
            fixed = state.resident + again
            twins = np.asarray(self.units.twin)
            key = replace(like, recompute=policy)
            way = Way(
                key,
                self._room(machine),
                seconds=seconds[twins],
                once=state.once[twins],
                fixed=fixed[twins],
                saved=costs.saved[policy][twins],
                transient=2 * costs.largest[twins],
                entry=entry,
                held=short.crossing,
            )
            found.append(way)
        return found

    def _entry(self, nbytes: np.ndarray, machine: MeshMachine) -> np.ndarray:
        """Seconds that a microbatch (and its gradient) needs to enter at every unit."""
        devices = machine.mesh.devices
        other = max(devices) + 1 if max(devices) + 1 < self.cluster.n_devices else min(devices) - 1
        if other < 0:
            return np.zeros(len(nbytes))
        latency = p2p_s(self.cluster, devices[-1], other, 0, self.calibration)
        per_byte = p2p_s(self.cluster, devices[-1], other, 1 << 20, self.calibration) - latency
        return np.where(nbytes > 0, 2 * (latency + nbytes * per_byte / (1 << 20)), 0.0)


def _modes(shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """What the integer program may do on each axis, one try after the other."""
    if not shape:
        return [()]
    if len(shape) == 1:
        return [("free",), ("tensor",)]
    return [("free",) * len(shape)]


def op_sharding(
    sharding: Mapping[int, Mapping[str, str]], units: Units, graph: OpGraph
) -> dict[str, str]:
    """Strategy text of every op that does not run whole: repeated units do as their twin does.

    Args:
        sharding: Unit that stands for others → op id → text (`WayKey.sharding`).
        units: The model's units.
        graph: The captured model.
    """
    exact: dict[str, str] = {}
    for unit, twin in enumerate(units.twin):
        texts = sharding.get(twin, {})
        here = graph.ops[units.bounds[unit] : units.bounds[unit + 1]]
        there = graph.ops[units.bounds[twin] : units.bounds[twin + 1]]
        for mine, like in zip(here, there, strict=True):
            if like.id in texts:
                exact[mine.id] = texts[like.id]
    return exact
