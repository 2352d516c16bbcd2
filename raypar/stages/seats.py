"""The devices of a run: which bundle of which placement group each rank sits on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raypar.errors import ClusterError
from raypar.mesh.bundles import BundleRange
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import PlacementRequest, device_meshes
from raypar.mesh.placement import acquire, check_nodes, release
from raypar.plan import Plan
from raypar.stages.faults import RankInfo
from raypar.stages.orphans import remove_orphans

_DEADLINE_KEY = "ScalingConfig.placement_timeout_s or mesh.placement_timeout_s"


@dataclass(frozen=True)
class SeatSettings:
    """What to reserve.

    Attributes:
        requests: The placement groups.
        at: For every rank, (index of its group, its bundle).
        cluster: Where the plan's devices are; None to take any.
        deadline_s: How long to try, in seconds.
        lent: Bundles of somebody else's group to take instead; `at` then counts in these.
    """

    requests: tuple[PlacementRequest, ...]
    at: tuple[tuple[int, int], ...]
    cluster: Cluster | None = None
    deadline_s: float = 30.0
    lent: tuple[BundleRange, ...] = ()

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        cluster: Cluster,
        infos: Sequence[RankInfo],
        *,
        run: str,
        cpus_per_rank: float = 1.0,
        deadline_s: float = 30.0,
    ) -> SeatSettings:
        """One group for every mesh of the plan, on the nodes that it chose.

        Raises:
            ClusterError: The plan's meshes overlap, or name devices that the cluster lacks.
        """
        meshes, _ = device_meshes([stage.mesh for stage in plan.stages], run)
        seat = {d: (i, j) for i, mesh in enumerate(meshes) for j, d in enumerate(mesh.devices)}
        return cls(
            tuple(m.request(cluster, cpus_per_device=cpus_per_rank) for m in meshes),
            tuple(seat[info.device] for info in infos),
            cluster,
            deadline_s,
        )

    @classmethod
    def on_lent(
        cls, plan: Plan, bundles: BundleRange, infos: Sequence[RankInfo], *, run: str
    ) -> SeatSettings:
        """A named range of somebody else's bundles for every mesh of the plan.

        Args:
            plan: Made for the cluster that the bundles are (`BundleRange.cluster`).
            bundles: What was lent.
            infos: The ranks.
            run: The run's name.

        Raises:
            ClusterError: The plan's meshes overlap, or want more than there is.
        """
        cluster, order = bundles.cluster()
        meshes, _ = device_meshes([stage.mesh for stage in plan.stages], run)
        ranges: list[BundleRange] = []
        seat: dict[int, tuple[int, int]] = {}
        for index, mesh in enumerate(meshes):
            positions = [_bundle_of(device, order, bundles) for device in mesh.devices]
            first = min(positions)
            ranges.append(bundles.sub(mesh.name, first, max(positions) - first + 1))
            both = zip(mesh.devices, positions, strict=True)
            seat.update((device, (index, at - first)) for device, at in both)
        at = tuple(seat[info.device] for info in infos)
        return cls((), at, cluster, lent=tuple(ranges))

    @classmethod
    def anywhere(
        cls,
        infos: Sequence[RankInfo],
        *,
        run: str,
        cpus_per_rank: float = 1.0,
        deadline_s: float = 30.0,
    ) -> SeatSettings:
        """One group with a bundle per rank, wherever there is room."""
        bundles = tuple(
            {"CPU": cpus_per_rank, **({"GPU": 1.0} if info.needs_gpu else {})} for info in infos
        )
        request = PlacementRequest(f"raypar/{run}/ranks", bundles, ("",) * len(bundles))
        return cls((request,), tuple((0, i) for i in range(len(infos))), None, deadline_s)


class Seats:
    """Placement groups that are held, until `release`."""

    def __init__(self, settings: SeatSettings, ranges: Sequence[BundleRange]) -> None:
        self._settings = settings
        self._ranges = list(ranges)

    @classmethod
    def acquire(cls, settings: SeatSettings) -> Seats:
        """Reserves all groups or none.

        Raises:
            ClusterError: The cluster cannot hold them, or not before the deadline.
        """
        if settings.lent:
            return cls(settings, settings.lent)
        remove_orphans()
        groups = acquire(settings.requests, settings.deadline_s, deadline_key=_DEADLINE_KEY)
        return cls(
            settings,
            [BundleRange.own(r.name, g) for r, g in zip(settings.requests, groups, strict=True)],
        )

    def options(self, rank: int) -> dict[str, Any]:
        """Actor options that put a rank onto its bundle; never restarted, nothing run twice."""
        group, bundle = self._settings.at[rank]
        return self._ranges[group].actor_options(bundle)

    def check(self, node_ids: Sequence[str], infos: Sequence[RankInfo]) -> None:
        """Compares the nodes that the actors report with the plan's.

        Raises:
            ClusterError: An actor is elsewhere.
        """
        if self._settings.cluster is not None:
            at = {info.device: node for info, node in zip(infos, node_ids, strict=True)}
            check_nodes(at, self._settings.cluster)

    def release(self) -> None:
        """Gives own groups back, which ends what runs in them; safe to call twice."""
        release([r.group for r in self._ranges if r.owned])
        self._ranges = []


def _bundle_of(device: int, order: Sequence[int], bundles: BundleRange) -> int:
    if device >= len(order):
        raise ClusterError(
            f"{bundles.name!r} has {len(order)} devices (0 to {len(order) - 1}), the plan uses "
            f"device {device}: make a plan for these, or ask for more bundles"
        )
    return order[device]
