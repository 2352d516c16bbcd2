"""A mesh of devices, and the placement group that it asks for.

Nothing here meets Ray: a `PlacementRequest` is a plain value that `raypar.mesh.placement` acquires.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raypar.errors import ClusterError
from raypar.mesh.cluster import Cluster


class SliceLike(Protocol):
    """What a plan says about the devices of a stage (`raypar.plan.MeshSlice`)."""

    @property
    def devices(self) -> tuple[int, ...]:
        """Cluster-wide device indices, row-major."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Mesh shape."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """One name per axis."""
        ...


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A placement group that is wanted.

    Attributes:
        name: Readable name, as `ray list placement-groups` shows it.
        bundles: One dict of resources for every device, in mesh order.
        nodes: For every bundle the id of the Ray node it must lie on, or empty for any.
        strategy: ``PACK``, ``SPREAD``, ``STRICT_PACK`` or ``STRICT_SPREAD`` for what `nodes`
            leaves open.
        key: The configuration key that made it this large, for messages.
    """

    name: str
    bundles: tuple[Mapping[str, float], ...] = field(hash=False)
    nodes: tuple[str, ...]
    strategy: str = "PACK"
    key: str = "mesh.num_workers"

    def __post_init__(self) -> None:
        if not self.bundles:
            raise ClusterError(f"placement group {self.name!r} has no bundles")
        if len(self.bundles) != len(self.nodes):
            raise ClusterError(
                f"placement group {self.name!r}: {len(self.bundles)} bundles but "
                f"{len(self.nodes)} nodes; give one node id (or '') for each bundle"
            )

    def total(self) -> dict[str, float]:
        """Resource → how much all bundles together ask for."""
        result: dict[str, float] = {}
        for bundle in self.bundles:
            for resource, amount in bundle.items():
                result[resource] = result.get(resource, 0) + amount
        return result


@dataclass(frozen=True, slots=True)
class DeviceMesh:
    """Devices laid out in a grid with named axes.

    Attributes:
        name: Readable name (run and stages).
        devices: Cluster-wide device indices, row-major.
        shape: Its product is ``len(devices)``.
        axes: One name per axis.
    """

    name: str
    devices: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("data",)

    def __post_init__(self) -> None:
        where = f"mesh {self.name!r}"
        if not self.devices:
            raise ClusterError(f"{where} has no devices")
        if len(set(self.devices)) < len(self.devices):
            twice = sorted({d for d in self.devices if self.devices.count(d) > 1})
            raise ClusterError(f"{where}: devices {twice} appear twice in {list(self.devices)}")
        if min(self.shape, default=0) < 1 or math.prod(self.shape) != len(self.devices):
            raise ClusterError(
                f"{where}: shape {list(self.shape)} holds {math.prod(self.shape)} devices, but "
                f"{len(self.devices)} are listed; for example shape [{len(self.devices)}]"
            )
        if len(self.axes) != len(self.shape) or len(set(self.axes)) < len(self.axes):
            raise ClusterError(
                f"{where}: axes {list(self.axes)} must be {len(self.shape)} different names, one "
                "per entry of shape"
            )

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.devices)

    def coordinate(self, position: int) -> tuple[int, ...]:
        """Where the device at `position` (0 to size - 1) lies, one index per axis."""
        if not 0 <= position < self.size:
            raise ClusterError(
                f"mesh {self.name!r} has positions 0 to {self.size - 1}, asked for {position}"
            )
        result: list[int] = []
        for extent in reversed(self.shape):
            position, index = divmod(position, extent)
            result.append(index)
        return tuple(reversed(result))

    def lines(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The groups of positions that differ along `axis` alone, each in axis order.

        Raises:
            ClusterError: The mesh has no such axis.
        """
        if axis not in self.axes:
            raise ClusterError(
                f"mesh {self.name!r} has no axis {axis!r}; it has {', '.join(self.axes)}"
            )
        at = self.axes.index(axis)
        groups: dict[tuple[int, ...], list[int]] = {}
        for position in range(self.size):
            where = self.coordinate(position)
            groups.setdefault(where[:at] + where[at + 1 :], []).append(position)
        return tuple(tuple(group) for group in groups.values())

    def request(
        self,
        cluster: Cluster,
        *,
        cpus_per_device: float = 1.0,
        strategy: str = "PACK",
        extra: Mapping[str, float] | None = None,
    ) -> PlacementRequest:
        """The placement group that this mesh needs: one bundle per device, in mesh order.

        Each bundle is pinned to the node that the plan chose, where the cluster's nodes have Ray
        ids; on a cluster without them (local, virtual, from a file) Ray is free to choose.

        Args:
            cluster: The cluster that the device indices refer to.
            cpus_per_device: CPUs of a bundle; on CPU devices the bundle *is* the CPU.
            strategy: Ray's strategy for bundles without a pin.
            extra: More resources for every bundle, for example ``{"memory": 2**30}``.

        Raises:
            ClusterError: A device is not in the cluster.
        """
        bundles: list[Mapping[str, float]] = []
        nodes: list[str] = []
        for device in self.devices:
            node = cluster.node_of(device)
            bundle: dict[str, float] = {"CPU": cpus_per_device} if cpus_per_device else {}
            if node.device.is_gpu:
                bundle["GPU"] = 1
            bundles.append({**bundle, **(extra or {})})
            nodes.append(node.id)
        return PlacementRequest(self.name, tuple(bundles), tuple(nodes), strategy)


def device_meshes(
    slices: Sequence[SliceLike], run: str
) -> tuple[tuple[DeviceMesh, ...], tuple[int, ...]]:
    """The meshes of a run: stages with equal slices share one.

    Args:
        slices: The mesh slice of every stage, in stage order.
        run: The run's name; a mesh is called ``raypar/<run>/stages-0,2``.

    Returns:
        The meshes in order of their first stage, and for every stage the index of its mesh.

    Raises:
        ClusterError: Two slices overlap without being equal, or one is malformed.
    """
    stages: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]], list[int]] = {}
    owner: dict[int, int] = {}
    for stage, part in enumerate(slices):
        key = (tuple(part.devices), tuple(part.shape), tuple(part.axes))
        if key not in stages:
            for device in key[0]:
                if device in owner:
                    raise ClusterError(
                        f"stages {owner[device]} and {stage} share device {device}, but their "
                        f"meshes differ ({list(slices[owner[device]].devices)} and "
                        f"{list(key[0])}): give both the same mesh, or disjoint ones"
                    )
            owner.update(dict.fromkeys(key[0], stage))
        stages.setdefault(key, []).append(stage)
    order = {key: i for i, key in enumerate(stages)}
    index = tuple(order[(tuple(s.devices), tuple(s.shape), tuple(s.axes))] for s in slices)
    meshes = tuple(
        DeviceMesh(f"raypar/{run}/{_stage_name(held)}", *key) for key, held in stages.items()
    )
    return meshes, index


def _stage_name(stages: Sequence[int]) -> str:
    if len(stages) == 1:
        return f"stage-{stages[0]}"
    return "stages-" + ",".join(map(str, stages))
