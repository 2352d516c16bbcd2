"""What the ranks of a cluster share: ports of devices, and the cores of a CPU node.

Every device has a port out and a port in to its node and to the other nodes (`Link` figures are
what one device gets). Tensors between CPU ranks are moved by the cores themselves, and where a node
has more ranks than cores, ranks share the cores.

A piece of work *needs* a time alone and seconds of each resource; `settle` turns needs into `Timed`
values over numbered resources, and leaves out resources that can never be short. A cluster has
thousands of ports: they are numbered, and loads are arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raypar.errors import ClusterError
from raypar.mesh.calibration import ACROSS, INSIDE, Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice
from raypar.search._sim_fluid import FULL
from raypar.search._sim_program import Timed
from raypar.search.cost.base import Collective
from raypar.sharding.convert import ALL_MAX, ALL_REDUCE

TIERS = (INSIDE, ACROSS)
"""Tiers of links by their number, as a row of figures has them."""
OUT, IN = 0, 1
_PORTS = 4
"""Ports of a device: port ``2 * tier + direction`` of device d is resource ``4 d`` plus that; the
cores of node n come after all ports."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Tiles(NamedTuple):
    """Parts of values that go from one device to another, side by side."""

    sources: Ints
    targets: Ints
    nbytes: Ints

    def moving(self) -> Tiles:
        """Those that do not stay where they are."""
        away = self.sources != self.targets
        return self if away.all() else Tiles(*(row[away] for row in self))


@dataclass(frozen=True)
class Need:
    """What a piece of work takes.

    Attributes:
        actor: Who does it; an actor does one thing at a time.
        seconds: Its time alone, in seconds, however free the resources are.
        resources: Numbers of the resources that it needs, each once.
        load: Seconds for which it needs all of each of them.
    """

    actor: tuple[str, int, int]
    seconds: float
    resources: Ints
    load: Floats

    @cached_property
    def alone(self) -> float:
        """Its time with nobody else around, in seconds."""
        return max(self.seconds, float(self.load.max(initial=0.0)))


class Fabric:
    """The shared resources of a cluster.

    Args:
        cluster: Devices and links.
        calibration: What links reach.
        cores: Cores that the ranks of each CPU node share; None: every device is a core of its own.

    Raises:
        ClusterError: `cores` is not positive.
    """

    def __init__(self, cluster: Cluster, calibration: Calibration, cores: int | None) -> None:
        if cores is not None and cores < 1:
            raise ClusterError(f"cores is the number of cores of a CPU node, found {cores}; try 2")
        self.calibration = calibration
        nodes = cluster.nodes
        self._node = np.repeat(np.arange(len(nodes)), cluster.shape)
        rates = (calibration.inside.p2p.efficiency, calibration.across.p2p.efficiency)
        links = ([n.inside for n in nodes], [n.across for n in nodes])
        by_node = [
            [link.bandwidth * rate for link in own] for own, rate in zip(links, rates, strict=True)
        ]
        self.bandwidth: Floats = np.array(by_node)[:, self._node]
        """Bytes per second that a port reaches in one direction; shape (tiers, devices)."""
        self._cores: Ints = np.array([0 if n.device.is_gpu else cores or n.devices for n in nodes])
        self._tiers: dict[tuple[MeshSlice, str], int] = {}

    def tiers(self, tiles: Tiles) -> Ints:
        """Which links lie between the ends of each tile, as a number in `TIERS`."""
        return (self._node[tiles.sources] != self._node[tiles.targets]).astype(np.int64)

    def latency(self, tiles: Tiles) -> float:
        """Latency of the slowest tile, in seconds."""
        rates = (self.calibration.inside.p2p, self.calibration.across.p2p)
        far = np.unique(self.tiers(tiles.moving()))
        return max((rates[tier].latency for tier in far), default=0.0)

    def transfer(self, actor: tuple[str, int, int], tiles: Tiles) -> Need:
        """What a message needs that consists of these tiles."""
        sources, targets, nbytes = tiles = tiles.moving()
        tier = self.tiers(tiles)
        out, into = self.bandwidth[tier, sources], self.bandwidth[tier, targets]
        moving = nbytes / np.minimum(out, into)
        port = 2 * tier
        ends = np.stack([sources, targets], axis=1).ravel()
        return _need(
            actor,
            0.0,
            [_PORTS * sources + port + OUT, _PORTS * targets + port + IN, self._core(ends)],
            [nbytes / out, nbytes / into, self._on_core(ends, np.repeat(moving, 2))],
        )

    def compute(
        self,
        actor: tuple[str, int, int],
        mesh: MeshSlice,
        devices: Sequence[int],
        seconds: float,
        collectives: Sequence[Collective] = (),
    ) -> Need:
        """What computing on `devices` of a mesh needs, with the collectives in between."""
        whole = seconds + sum(c.seconds for c in collectives)
        by_tier: dict[int, float] = {}
        tiers = self.axis_tiers(mesh, collectives)
        for one in collectives:
            tier = tiers[one.axis]
            by_tier[tier] = by_tier.get(tier, 0.0) + one.seconds
        places = np.array(devices, dtype=np.int64)
        resources, load = [self._core(places)], [self._on_core(places, whole)]
        for tier, busy in by_tier.items():
            resources.append((_PORTS * places[:, None] + 2 * tier + np.array([OUT, IN])).ravel())
            load.append(np.full(2 * len(places), busy))
        return _need(actor, whole, resources, load)

    def axis_tiers(self, mesh: MeshSlice, collectives: Iterable[Collective]) -> dict[str, int]:
        """Axis → number of its tier, for all axes of some collectives."""
        # Each axis is asked for once: to look a mesh up takes as long as it has devices.
        return {axis: self.axis_tier(mesh, axis) for axis in {one.axis for one in collectives}}

    def axis_tier(self, mesh: MeshSlice, axis: str) -> int:
        """Whether a mesh axis stays inside nodes: the number of its tier."""
        key = (mesh, axis)
        if key not in self._tiers:
            self._tiers[key] = self._find_tier(mesh, axis)
        return self._tiers[key]

    def _find_tier(self, mesh: MeshSlice, axis: str) -> int:
        place = mesh.axes.index(axis)
        nodes = self._node[list(mesh.devices)].reshape(mesh.shape)
        first = nodes.take([0], axis=place)
        return int((nodes != first).any())

    def _core(self, devices: Ints) -> Ints:
        """Resources that a rank's thread is on, for the devices that have some."""
        nodes = self._node[devices]
        return _PORTS * len(self._node) + nodes[self._cores[nodes] > 0]

    def _on_core(self, devices: Ints, seconds: Floats | float) -> Floats:
        """Seconds of them that a rank's thread is on a core for so long."""
        cores = self._cores[self._node[devices]]
        busy = np.broadcast_to(seconds, cores.shape)
        return busy[cores > 0] / cores[cores > 0]


def _need(
    actor: tuple[str, int, int], seconds: float, resources: list[Ints], load: list[Floats]
) -> Need:
    """A need with what is asked of each resource summed up."""
    found, place = np.unique(np.concatenate(resources), return_inverse=True)
    summed: Floats = np.zeros(len(found))
    np.add.at(summed, place, np.concatenate(load))
    return Need(actor, seconds, found, summed)


def collective_bytes(one: Collective, size: int) -> int:
    """Bytes that one device sends in a collective over `size` devices."""
    times = 2 if one.kind in (ALL_REDUCE, ALL_MAX) else 1
    return times * one.nbytes * (size - 1) // size


def settle(needs: Sequence[Need]) -> tuple[list[Timed], int]:
    """Numbers the resources of needs.

    Resources that all the same needs use alike count as one, and those that could not be
    overloaded even if all actors used them at once are left out.

    Returns:
        The needs as timed work, in order, and how many resources there are.
    """
    uses: list[list[tuple[int, int]]] = [[] for _ in needs]
    numbers = 0
    for found in _demands(needs):
        if _can_be_short(needs, found):
            for index, parts in found:
                uses[index].append((numbers, parts))
            numbers += 1
    timed = [Timed(need.alone, tuple(own)) for need, own in zip(needs, uses, strict=True)]
    return timed, numbers


def _demands(needs: Sequence[Need]) -> list[list[tuple[int, int]]]:
    """What is asked of resources: (need, parts of `FULL`) of each, once of equal ones."""
    rows: list[tuple[Ints, Ints, Ints]] = []
    for index, need in enumerate(needs):
        if need.alone > 0:
            parts = (need.load / need.alone * FULL).astype(np.int64)
            some = parts > 0
            rows.append((need.resources[some], np.full(some.sum(), index), parts[some]))
    if not rows:
        return []
    resources, asking, parts = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(resources, kind="stable")
    pairs = np.stack([asking[order], parts[order]], axis=1)
    borders = np.flatnonzero(np.diff(resources[order])) + 1
    edges = [0, *borders.tolist(), len(pairs)]
    distinct: dict[bytes, Ints] = {}
    for first, last in pairwise(edges):
        own = pairs[first:last]
        distinct.setdefault(own.tobytes(), own)
    return [[(index, asked) for index, asked in own.tolist()] for own in distinct.values()]


def _can_be_short(needs: Sequence[Need], found: Sequence[tuple[int, int]]) -> bool:
    most: dict[tuple[str, int, int], int] = {}
    for index, parts in found:
        actor = needs[index].actor
        most[actor] = max(most.get(actor, 0), parts)
    return sum(most.values()) > FULL
