"""The devices of a run, reserved on the cluster: placement groups, and which bundle each rank has."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raypar.errors import ClusterError
from raypar.stages.faults import RankInfo


@dataclass(frozen=True)
class SeatSettings:
    """What to reserve.

    Attributes:
        name: Prefix of the groups' names.
        cluster: Devices per node, in node order, as the plan says.
        cpus_per_rank: CPUs of one rank's bundle.
        timeout_s: Deadline, in seconds.
    """

    name: str
    cluster: tuple[int, ...]
    cpus_per_rank: float = 1.0
    timeout_s: float = 30.0


class Seats:
    """One bundle per rank."""

    def __init__(self, group: PlacementGroup, settings: SeatSettings) -> None:
        self._group: PlacementGroup | None = group
        self._settings = settings

    @classmethod
    def acquire(
        cls, infos: Sequence[RankInfo], settings: SeatSettings, closing: threading.Event
    ) -> Seats:
        """Reserves all bundles or none.

        Raises:
            ClusterError: The cluster cannot hold them, or not before the deadline.
        """
        bundle = _bundle(infos[0], settings)
        total = ray.cluster_resources()
        for resource, amount in bundle.items():
            needed = amount * len(infos)
            if needed > total.get(resource, 0.0):
                raise ClusterError(
                    f"the plan needs {len(infos)} devices with {bundle} each, so {needed:g} "
                    f"{resource}; the cluster has {total.get(resource, 0.0):g} {resource}: make a "
                    "plan for fewer devices (ScalingConfig(num_workers=...)), or add nodes"
                )
        group = placement_group([dict(bundle) for _ in infos], "PACK", name=settings.name)
        seats = cls(group, settings)
        deadline = time.monotonic() + settings.timeout_s
        while not group.wait(0.5):
            if closing.is_set() or time.monotonic() > deadline:
                seats.release()
                raise ClusterError(
                    f"{len(infos)} bundles {bundle} were not free within {settings.timeout_s:g} s; "
                    f"free now: {ray.available_resources()}: other jobs hold the rest"
                )
        return seats

    def options(self, info: RankInfo) -> dict[str, Any]:
        """Actor options that put a rank onto its bundle."""
        bundle = _bundle(info, self._settings)
        return {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=info.rank
            ),
        }

    def check(self, node_ids: Sequence[str], infos: Sequence[RankInfo]) -> None:
        """Compares the nodes that the actors are on with the plan's."""

    def release(self) -> None:
        """Gives the bundles back; a second call does nothing."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(group)


def _bundle(info: RankInfo, settings: SeatSettings) -> dict[str, float]:
    bundle = {"CPU": settings.cpus_per_rank}
    if info.needs_gpu:
        bundle["GPU"] = 1.0
    return bundle
