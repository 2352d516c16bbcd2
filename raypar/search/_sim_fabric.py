"""What the ranks of a cluster share: ports of devices, and the cores of a CPU node.

Every device has a port out and a port in to its node and to the other nodes (`Link` figures are
what one device gets). Tensors between CPU ranks are moved by the cores themselves, and where a node
has more ranks than cores, ranks share the cores.

A piece of work *needs* a time alone and seconds of each resource; the `Fabric` turns needs into
`Timed` values over numbered resources, and leaves out resources that can never be short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raypar.errors import ClusterError
from raypar.mesh.calibration import ACROSS, INSIDE, Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice
from raypar.search._sim_fluid import FULL
from raypar.search._sim_program import Timed
from raypar.search.cost.base import Collective
from raypar.sharding.convert import ALL_MAX, ALL_REDUCE

OUT, IN, CORES = "out", "in", "cores"


class Resource(NamedTuple):
    """One thing that is shared.

    Attributes:
        what: ``out`` or ``in`` (a device's port), or ``cores`` (a node's).
        place: The device, or the node.
        tier: ``inside`` or ``across`` for ports.
    """

    what: str
    place: int
    tier: str = ""


class Tile(NamedTuple):
    """A part of a value that goes from one device to another."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Need:
    """What a piece of work takes.

    Attributes:
        actor: Who does it; an actor does one thing at a time.
        seconds: Its time alone, in seconds, however free the resources are.
        load: Resource → seconds for which the work needs all of it.
    """

    actor: tuple[str, int, int]
    seconds: float
    load: Mapping[Resource, float] = field(default_factory=dict)

    @property
    def alone(self) -> float:
        """Its time with nobody else around, in seconds."""
        return max(self.seconds, max(self.load.values(), default=0.0))


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
        self.cluster = cluster
        self.calibration = calibration
        self._cores = cores
        self._tiers: dict[tuple[MeshSlice, str], str] = {}

    def tier(self, a: int, b: int) -> str:
        """Which links lie between two devices."""
        same = self.cluster.device(a)[0] == self.cluster.device(b)[0]
        return INSIDE if same else ACROSS

    def latency(self, tiles: Iterable[Tile]) -> float:
        """Latency of the slowest tile, in seconds."""
        rates = {INSIDE: self.calibration.inside.p2p, ACROSS: self.calibration.across.p2p}
        far = {self.tier(t.source, t.target) for t in tiles if t.source != t.target}
        return max((rates[tier].latency for tier in far), default=0.0)

    def bandwidth(self, device: int, tier: str) -> float:
        """Bytes per second that a device's port reaches in one direction."""
        node = self.cluster.node_of(device)
        if tier == INSIDE:
            return node.inside.bandwidth * self.calibration.inside.p2p.efficiency
        return node.across.bandwidth * self.calibration.across.p2p.efficiency

    def transfer(self, actor: tuple[str, int, int], tiles: Sequence[Tile]) -> Need:
        """What a message needs that consists of these tiles."""
        load: dict[Resource, float] = {}
        for source, target, nbytes in tiles:
            if source == target:
                continue
            tier = self.tier(source, target)
            seconds = nbytes / min(self.bandwidth(source, tier), self.bandwidth(target, tier))
            _add(load, Resource(OUT, source, tier), nbytes / self.bandwidth(source, tier))
            _add(load, Resource(IN, target, tier), nbytes / self.bandwidth(target, tier))
            for end in (source, target):
                self._busy(load, end, seconds)
        return Need(actor, 0.0, load)

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
        load: dict[Resource, float] = {}
        for device in devices:
            self._busy(load, device, whole)
        by_tier: dict[str, float] = {}
        tiers = self.axis_tiers(mesh, collectives)
        for one in collectives:
            tier = tiers[one.axis]
            by_tier[tier] = by_tier.get(tier, 0.0) + one.seconds
        for tier, seconds in by_tier.items():
            for device in devices:
                _add(load, Resource(OUT, device, tier), seconds)
                _add(load, Resource(IN, device, tier), seconds)
        return Need(actor, whole, load)

    def axis_tiers(self, mesh: MeshSlice, collectives: Iterable[Collective]) -> dict[str, str]:
        """Axis → its tier, for all axes of some collectives."""
        # Each axis is asked for once: to look a mesh up takes as long as it has devices.
        return {axis: self.axis_tier(mesh, axis) for axis in {one.axis for one in collectives}}

    def axis_tier(self, mesh: MeshSlice, axis: str) -> str:
        """Whether a mesh axis stays inside nodes."""
        key = (mesh, axis)
        if key not in self._tiers:
            self._tiers[key] = self._find_tier(mesh, axis)
        return self._tiers[key]

    def _find_tier(self, mesh: MeshSlice, axis: str) -> str:
        place = mesh.axes.index(axis)
        stride = 1
        for size in mesh.shape[place + 1 :]:
            stride *= size
        nodes = [self.cluster.device(d)[0] for d in mesh.devices]
        reach = stride * mesh.shape[place]
        inside = all(
            nodes[i] == nodes[i - i % reach + i % stride] for i in range(len(mesh.devices))
        )
        return INSIDE if inside else ACROSS

    def _busy(self, load: dict[Resource, float], device: int, seconds: float) -> None:
        """A rank's thread is on a core for so long."""
        node, _ = self.cluster.device(device)
        if self.cluster.nodes[node].device.is_gpu:
            return
        cores = self._cores or self.cluster.nodes[node].devices
        _add(load, Resource(CORES, node), seconds / cores)


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
    demands: dict[Resource, list[tuple[int, int]]] = {}
    for index, need in enumerate(needs):
        alone = need.alone
        for resource, seconds in need.load.items():
            parts = int(seconds / alone * FULL) if alone > 0 else 0
            if parts:
                demands.setdefault(resource, []).append((index, parts))
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    uses: list[list[tuple[int, int]]] = [[] for _ in needs]
    for found in demands.values():
        key = tuple(found)
        if key in numbers or not _can_be_short(needs, found):
            continue
        numbers[key] = len(numbers)
        for index, parts in found:
            uses[index].append((numbers[key], parts))
    timed = [Timed(need.alone, tuple(own)) for need, own in zip(needs, uses, strict=True)]
    return timed, len(numbers)


def _can_be_short(needs: Sequence[Need], found: Sequence[tuple[int, int]]) -> bool:
    most: dict[tuple[str, int, int], int] = {}
    for index, parts in found:
        actor = needs[index].actor
        most[actor] = max(most.get(actor, 0), parts)
    return sum(most.values()) > FULL


def _add(load: dict[Resource, float], resource: Resource, seconds: float) -> None:
    load[resource] = load.get(resource, 0.0) + seconds
