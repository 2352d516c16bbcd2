"""What every search over pipelines stands on: units, devices in line, and ways with their tables.

Shardings are worked out once for a graph, whoever asks (`WayMaker`): planners, the study's trials
and the rungs of a ladder share them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import numpy as np

from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MemoryPolicy, MeshSlice, Plan, StagePlan
from raypar.search.config import SearchConfig
from raypar.search.interop.pipeline import Places, Stage, WayTable
from raypar.search.interop.space import AXIS_NAMES, Split, alike, line_of_devices
from raypar.search.interop.units import Units, find_units
from raypar.search.interop.ways import ANY, WayKey, WayMaker, Wish, op_sharding
from raypar.sharding.strategies import fold_patterns

MOST_STAGES = 128
_CLOSE = 1.03
"""Sizes of microbatches whose bounds differ by no more than this factor promise about the same."""


class Workbench:
    """What is known about one model on one cluster.

    Args:
        graph: The captured model.
        cluster: The devices.
        config: What is fixed and what is free.
        calibration: What the cluster reaches; None: what is on disk for it, else the device table.
        least: Fewest units that the model is cut into.

    Attributes:
        units: The pieces that are never cut.
        maker: Makes and remembers ways.
        line: Devices in the order in which stages take them.
        alike: Whether all nodes are the same.
        per_node: Devices of the largest node.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        config: SearchConfig,
        calibration: Calibration | None = None,
        *,
        least: int = 1,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.config = config
        self.calibration = calibration or load_calibration(cluster)
        self.maker = _maker(graph, cluster, config, self.calibration, least)
        self.units: Units = self.maker.units
        self.line = line_of_devices(cluster)
        self.alike = alike(cluster)
        self.per_node = max(node.devices for node in cluster.nodes)
        self._least: dict[int, list[tuple[np.ndarray, int]]] = {}

    def like(self, config: SearchConfig) -> Workbench:
        """The same with other options."""
        other = copy(self)
        other.config = config
        other.maker = self.maker.like(config)
        return other

    def tables(
        self,
        split: Split,
        size: int,
        unit: int,
        wish: Wish = ANY,
        line: Sequence[int] = (),
        schedule: str = "1f1b",
    ) -> Places:
        """Stage times on meshes of `size` devices: one table, or one for every place.

        Args:
            split: How the batch is cut.
            size: Devices of a stage (of one replica).
            unit: Places are counted in so many devices.
            wish: Which ways.
            line: Devices in the order in which stages take them; default: `line`.
            schedule: Says how many microbatches a stage holds.

        Returns:
            One table where all nodes are alike, else one for every place; a stage begins at a
            multiple of its size, and wherever it has whole nodes or lies within one. Nothing where
            there is a place at which no way fits.
        """
        line = line or self.line
        # What is begun in time has some way at every place, or all that was solved is lost.
        anyway = replace(wish, until=math.inf) if time.perf_counter() <= wish.until else wish
        width = split.replicas * size
        places = [0] if self.alike else range(0, split.devices - size + 1, unit)
        made: dict[object, WayTable | None] = {}
        found: list[WayTable | None] = []
        for place in places:
            devices = line[place * split.replicas :][:width]
            if not (place % size == 0 or self._within_nodes(devices)):
                found.append(None)
                continue
            key = self._kinds_of(devices)
            if key not in made:
                ways = self.maker.ways(split, size, devices, wish)
                ways = ways or self.maker.ways(split, size, devices, anyway)
                made[key] = WayTable(ways, split.microbatches, schedule) if ways else None
            table = made[key]
            if table is None:
                return []
            found.append(table)
        if not self.alike:
            found += [None] * (split.devices // unit - len(found))
        return found

    def _within_nodes(self, devices: Sequence[int]) -> bool:
        """Whether devices are all of one node, or all those of several."""
        nodes = {self.cluster.device(d)[0] for d in devices}
        return len(nodes) == 1 or len(devices) == sum(self.cluster.nodes[n].devices for n in nodes)

    def least_seconds(self, split: Split) -> np.ndarray:
        """Per unit, seconds of one microbatch on one device that nothing shares or recomputes.

        On n devices a unit takes at least an nth of it: products and memory traffic are shared at
        best evenly, and what an op costs besides is paid by every device. Where different devices
        are, those of the fastest kind count. Zero where the shares of an op may be faster than
        they were together (rates that fall beyond a size).
        """
        return np.min([seconds for seconds, _ in self._alone(split)], axis=0)

    def least_period(self, split: Split) -> float:
        """Seconds per microbatch that no pipeline goes below, all devices of a replica at work.

        What a device does in a second is at most what it does alone.
        """
        wholes = [(float(seconds.sum()), devices) for seconds, devices in self._alone(split)]
        if any(whole <= 0.0 for whole, _ in wholes):
            return 0.0
        return split.replicas / sum(devices / whole for whole, devices in wholes)

    def least_step_s(self, split: Split, size: int, most_stages: int = MOST_STAGES) -> float:
        """Seconds of a step that no pipeline of stages of so many devices goes below."""
        alone = self.least_seconds(split)
        slots = min(most_stages, split.devices // size, len(alone))
        whole, unit = alone.sum() / size, alone.max() / size
        period = max(whole / slots, unit, self.least_period(split))
        return float(whole + (split.microbatches - 1) * period)

    def by_promise(self, by_size: Mapping[int, Sequence[Split]]) -> list[int]:
        """Sizes of microbatches, those first whose longest pipelines may be fastest.

        Of sizes that promise about the same, the smaller comes first: it takes less memory.

        Args:
            by_size: Size of a microbatch → the splits of that size.
        """
        least = {}
        for size, group in by_size.items():
            split = min(group, key=lambda split: split.replicas)
            least[size] = self.least_step_s(split, min(self.per_node, split.devices))
        found: list[int] = []
        while least:
            best = min(least.values())
            close = sorted(size for size, seconds in least.items() if seconds <= _CLOSE * best)
            found += close or sorted(least)  # that nothing can be said of
            least = {size: least[size] for size in least if size not in found}
        return found

    def _alone(self, split: Split) -> list[tuple[np.ndarray, int]]:
        """For every kind of device what the units take on one of them, and how many there are."""
        known = self._least.get(split.local_batch)
        if known is None:
            kinds: dict[str, tuple[int, int]] = {}
            for number, node in enumerate(self.cluster.nodes):
                first, count = kinds.get(node.device.name, (self.cluster.devices_of(number)[0], 0))
                kinds[node.device.name] = first, count + node.devices
            known = self._least[split.local_batch] = [
                (self.maker.alone_s(split, first), count) for first, count in kinds.values()
            ]
        return known

    def _kinds_of(self, devices: Sequence[int]) -> object:
        """What the costs of a mesh depend on: its devices' kinds, and which share a node."""
        numbers: dict[int, int] = {}
        found: list[object] = []
        for device in devices:
            at, _ = self.cluster.device(device)
            node = self.cluster.nodes[at]
            alike = numbers.setdefault(at, len(numbers))
            found.append((alike, node.device.name, node.inside, node.across, node.device_memory))
        return tuple(found)

    def plan_of(
        self,
        split: Split,
        stages: Sequence[Stage],
        schedule: str,
        *,
        planner: str,
        placement: Sequence[tuple[int, int]] | None = None,
        line: Sequence[int] = (),
        predicted: dict[str, float] | None = None,
    ) -> Plan:
        """The plan that stages on their places stand for.

        Args:
            split: How the batch is cut.
            stages: The stages in order; those of one rank group have the same place and size.
            schedule: Name of the schedule.
            planner: Who found them.
            placement: For every stage its (rank group, chunk); default: one stage for each group.
            line: Devices in the order in which stages take them; default: `line`.
            predicted: Figures of the step.
        """
        line = line or self.line
        made = []
        for stage in stages:
            key = stage.way.key
            assert isinstance(key, WayKey)
            first, last = self.units.bounds[stage.first], self.units.bounds[stage.last]
            at = stage.place * split.replicas
            mesh = MeshSlice(
                tuple(line[at : at + split.replicas * stage.devices]),
                (split.replicas, *key.shape),
                (DATA, *AXIS_NAMES[: len(key.shape)]),
            )
            made.append(
                StagePlan(
                    first=self.graph.ops[first].id,
                    last=self.graph.ops[last - 1].id,
                    mesh=mesh,
                    memory=MemoryPolicy(key.recompute, key.zero),
                    sharding=fold_patterns(
                        op_sharding(key.sharding, self.units, self.graph),
                        [op.id for op in self.graph.ops[first:last]],
                    ),
                    predicted={"microbatch_s": stage.seconds},
                )
            )
        return Plan.of(
            self.graph,
            self.cluster,
            made,
            microbatches=split.microbatches,
            schedule=schedule,
            placement=placement or [(s, 0) for s in range(len(made))],
            planner=planner,
            predicted=predicted,
        )


def _maker(
    graph: OpGraph, cluster: Cluster, config: SearchConfig, calibration: Calibration, least: int
) -> WayMaker:
    """A maker that knows what was worked out before for this graph on such devices.

    How many there are does not matter: a sharding belongs to the links of one mesh.
    """
    kinds = sorted({repr(node.device) for node in cluster.nodes})
    rates = replace(calibration, note="", fingerprint="")
    key = ("ways", *kinds, repr(rates), config.optimizer_states, least)
    if key not in graph.memo:
        units = find_units(graph, least=least)
        graph.memo[key] = WayMaker(graph, cluster, calibration, config, units)
    known: WayMaker = graph.memo[key]
    return known.like(config, cluster)
