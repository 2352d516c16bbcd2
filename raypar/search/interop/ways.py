"""Ways to run units on a mesh: a sharding for every mesh shape, then ZeRO levels and recomputation.

Shardings come from the intra-op integer program on the short graph
(`raypar.search.interop.shardings`); ZeRO and recomputation only change what is added up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, RECOMPUTE_POLICIES, MeshSlice
from raypar.search.config import SearchConfig
from raypar.search.cost.machine import MeshMachine, machine_of, p2p_s
from raypar.search.interop.costs import StateCosts, state_costs
from raypar.search.interop.pipeline import Way
from raypar.search.interop.shardings import LEAN, Sharding, Shardings
from raypar.search.interop.space import AXIS_NAMES, MANY_UNLIKE, Split, mesh_shapes
from raypar.search.interop.units import Units


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
        until: `time.perf_counter()` after which only ways of solved programs are told.
    """

    modes: str | None = None
    forms: tuple[tuple[str, str], ...] = ()
    recompute: str = "auto"
    zero: int | Literal["auto"] = "auto"
    axes: int | None = None
    until: float = math.inf


ANY = Wish()
_TIGHT = 0.5
"""Of the memory of all stages: where the fastest shardings store more, lean ones are looked at."""


@dataclass(frozen=True)
class WayKey:
    """What a way is.

    Attributes:
        shape: Shape of the stage's mesh without the replicas' axis.
        modes: What the integer program was free to do on each axis, or `LEAN`.
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
        self._shardings = Shardings(graph, units, config.optimizer_states)

    @property
    def solved(self) -> int:
        """How many integer programs were solved."""
        return self._shardings.solved

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
            told = self._told(split, machine, wish)
            wanted = [modes for modes in wanted if told(modes)]
            may_be_lean = wish.modes is None and ("free",) in wanted and told((LEAN,))
            if may_be_lean and self._is_tight(split, size, machine, wish.forms):
                wanted.append((LEAN,))
            for modes in wanted:
                solved = self._find(split, shape, modes, machine, wish.forms)
                for zero in self._zeros(split.replicas * size, wish):
                    state = self._state(split, solved, machine, zero)
                    key = WayKey(shape, modes, wish.forms, zero, "", solved.texts)
                    found += self._assemble(split, size, machine, key, solved, state, wish)
        return found

    def _told(
        self, split: Split, machine: MeshMachine, wish: Wish
    ) -> Callable[[tuple[str, ...]], bool]:
        """Whether there is time for what the integer program may do on each axis."""
        late = time.perf_counter() > wish.until
        return lambda modes: (
            not late
            or self._shardings.knows(split, modes, machine, wish.forms, any_kind=self._any_kind)
        )

    def _find(
        self,
        split: Split,
        shape: tuple[int, ...],
        modes: tuple[str, ...],
        machine: MeshMachine,
        forms: tuple[tuple[str, str], ...] = (),
    ) -> Sharding:
        return self._shardings.find(split, shape, modes, machine, forms, any_kind=self._any_kind)

    @property
    def _any_kind(self) -> bool:
        """Whether programs of two axes are saved on; where devices are alike it says nothing."""
        return self.cluster.n_devices >= MANY_UNLIKE

    def _is_tight(
        self, split: Split, size: int, machine: MeshMachine, forms: tuple[tuple[str, str], ...]
    ) -> bool:
        """Whether the fastest sharding over one axis may store more than stages have room for."""
        solved = self._find(split, (size,), ("free",), machine, forms)
        zero = min(1, max(self._zeros(split.replicas * size, ANY)))
        state = self._state(split, solved, machine, zero)
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
        seconds = self._shardings.find(split, (), (), machine).costs.seconds["none"]
        return seconds[np.asarray(self.units.twin)]

    def sharding(
        self, split: Split, shape: tuple[int, ...], modes: tuple[str, ...], devices: Sequence[int]
    ) -> Mapping[int, Mapping[str, str]]:
        """The sharding on one mesh shape; see `WayKey.sharding`."""
        mesh = MeshSlice(
            tuple(devices), (split.replicas, *shape), (DATA, *AXIS_NAMES[: len(shape)])
        )
        machine = machine_of(self.cluster, mesh, self.calibration)
        return self._find(split, shape, modes, machine).texts

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

    def _state(self, split: Split, solved: Sharding, machine: MeshMachine, zero: int) -> StateCosts:
        short = self._shardings.short(split.local_batch)
        settings = self._shardings.settings(split, zero=zero)
        return state_costs(solved.sharded, short.unit_of, len(self.units), machine, settings)

    def _assemble(
        self,
        split: Split,
        size: int,
        machine: MeshMachine,
        like: WayKey,
        solved: Sharding,
        state: StateCosts,
        wish: Wish,
    ) -> list[Way]:
        costs, short = solved.costs, self._shardings.short(split.local_batch)
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
