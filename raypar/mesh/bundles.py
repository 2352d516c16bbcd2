"""Bundles of a placement group, seen as the devices of a mesh.

A mesh runs on a group of its own, or on a named range of bundles of a group that somebody lent (a
Tune trial's, an elastic pool's). Both are a `BundleRange`; only an owned one releases its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raypar.errors import ClusterError
from raypar.mesh.cluster import Cluster
from raypar.mesh.discover import nodes_from
from raypar.mesh.placement import release


@dataclass(frozen=True)
class BundleRange:
    """Bundles `first` to ``first + count - 1`` of a placement group.

    Attributes:
        name: For messages.
        group: The placement group.
        first: Index of the first bundle.
        count: Number of bundles.
        owned: Whether `release` removes the group.
    """

    name: str
    group: PlacementGroup
    first: int
    count: int
    owned: bool = False

    def __post_init__(self) -> None:
        has = self.group.bundle_count
        if self.first < 0 or self.count < 1 or self.first + self.count > has:
            raise ClusterError(
                f"{self.name!r} wants bundles {self.first} to {self.first + self.count - 1}, but "
                f"the placement group has {has} (0 to {has - 1}); ask for at most "
                f"{max(0, has - max(0, self.first))} from bundle {max(0, self.first)} on"
            )

    @classmethod
    def own(cls, name: str, group: PlacementGroup) -> BundleRange:
        """All bundles of a group that belongs to this run."""
        return cls(name, group, 0, group.bundle_count, owned=True)

    @classmethod
    def lent(cls, name: str, group: PlacementGroup, first: int, count: int) -> BundleRange:
        """A part of somebody else's group."""
        return cls(name, group, first, count)

    @classmethod
    def current(cls, name: str, count: int) -> BundleRange:
        """The last `count` bundles of the group that this process itself runs in.

        Counted from the end, since the first bundle belongs to the caller (a Tune trial), and Ray
        drops it where it is empty.

        Raises:
            ClusterError: This process runs outside of placement groups, or the group is too small.
        """
        group = get_current_placement_group()
        if group is None:
            raise ClusterError(
                f"{name!r}: this process does not run inside a placement group; give the group, "
                "or let raypar acquire its own"
            )
        return cls(name, group, group.bundle_count - count, count)

    def sub(self, name: str, first: int, count: int) -> BundleRange:
        """A named part of this range; `first` counts from this range's own first bundle."""
        if first < 0 or first + count > self.count:
            raise ClusterError(
                f"{name!r} wants bundles {first} to {first + count - 1} of {self.name!r}, which "
                f"has {self.count}"
            )
        return BundleRange(name, self.group, self.first + first, count)

    def bundle(self, position: int) -> dict[str, float]:
        """Resources of the bundle at `position` (0 to count - 1)."""
        return dict(self.group.bundle_specs[self._index(position)])

    def actor_options(self, position: int) -> dict[str, Any]:
        """Options for ``Actor.options(...)``: the bundle at `position`, all of it.

        Never restarted and never retried, since a step must not run twice.
        """
        bundle = self.bundle(position)
        return {
            "num_cpus": bundle.pop("CPU", 0),
            "num_gpus": bundle.pop("GPU", 0),
            **({"memory": memory} if (memory := bundle.pop("memory", 0)) else {}),
            "resources": bundle,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group,
                placement_group_bundle_index=self._index(position),
                placement_group_capture_child_tasks=False,
            ),
        }

    def nodes(self) -> tuple[str, ...]:
        """The Ray node id of every bundle; empty where it is not placed."""
        placed: Mapping[int, str] = placement_group_table(self.group)["bundles_to_node_id"]
        return tuple(placed.get(self.first + i, "") for i in range(self.count))

    def cluster(self, device: str = "auto") -> tuple[Cluster, tuple[int, ...]]:
        """The bundles as a cluster to plan for: every bundle is one device.

        Returns:
            The cluster, and for each of its devices the position of its bundle in this range.

        Raises:
            ClusterError: A bundle is not placed, or its node is not alive.
        """
        placed = self.nodes()
        if not all(placed):
            raise ClusterError(
                f"{self.name!r}: bundles {[i for i, at in enumerate(placed) if not at]} are not "
                "placed yet; wait for the placement group (group.wait) first"
            )
        has_gpu = all(self.bundle(i).get("GPU", 0) >= 1 for i in range(self.count))
        wanted = ("GPU" if has_gpu else "CPU") if device == "auto" else device
        records = []
        for record in ray.nodes():
            held = placed.count(record["NodeID"])
            if held:
                total = {**record["Resources"], wanted.upper(): held}
                records.append({**record, "Resources": total})
        nodes = nodes_from(records, wanted)
        alive = {node.id for node in nodes}
        lost = [i for i, at in enumerate(placed) if at not in alive]
        if lost:
            raise ClusterError(f"{self.name!r}: the nodes of bundles {lost} are not alive")
        order = tuple(i for node in nodes for i, at in enumerate(placed) if at == node.id)
        return Cluster(nodes, self.name), order

    def release(self) -> None:
        """Removes the group if it is owned; a lent one stays as it is."""
        if self.owned:
            release([self.group])

    def _index(self, position: int) -> int:
        if not 0 <= position < self.count:
            raise ClusterError(
                f"{self.name!r} has bundles 0 to {self.count - 1}, asked for {position}"
            )
        return self.first + position
