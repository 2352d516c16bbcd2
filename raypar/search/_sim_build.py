"""From stages, their costs and a cluster to a program that can be played."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from raypar.errors import PlanError
from raypar.plan import DATA, MeshSlice
from raypar.schedules.instructions import Instruction, Kind
from raypar.search._sim_fabric import Fabric, Ints, Need, Tiles, collective_bytes, settle
from raypar.search._sim_input import Setting, edge_directions, kinds_of, replicas_alike
from raypar.search._sim_program import (
    LaneTimes,
    Program,
    Tied,
    Timed,
    Way,
    compile_program,
)
from raypar.search._sim_traffic import Traffic
from raypar.search.cost.base import Collective, total_s
from raypar.search.cost.machine import machine_of
from raypar.sharding.convert import ALL_GATHER, ALL_REDUCE

BUCKET_BYTES = 4 << 20
"""Gradients travel in buckets of this size, as in `raypar.stages.gradients`."""
MOST_BUCKETS = 8
"""More buckets of one stage than this are played as so many larger ones."""
NORM_BYTES = 8


@dataclass
class Built:
    """A program, and what its lanes and ways are.

    Attributes:
        program: Ready to play.
        lanes: The lanes.
        lane_replicas: Per lane its replica; None where one lane stands for all.
        lane_devices: Per lane its devices.
        comm_share: (lane, stage, kind) → share of the compute time that collectives take.
        sent_bytes: (device, tier) → bytes that it sends in a step.
        busy_s: (device, tier) → seconds for which its port out is needed in a step.
    """

    program: Program
    lanes: list[LaneTimes]
    lane_replicas: list[int | None]
    lane_devices: list[tuple[int, ...]]
    comm_share: dict[tuple[int, int, Kind], float]
    sent_bytes: dict[tuple[int, str], float] = field(default_factory=dict)
    busy_s: dict[tuple[int, str], float] = field(default_factory=dict)


def build(lists: Sequence[Sequence[Instruction]], setting: Setting) -> Built:
    """Puts lists, costs and cluster together.

    Raises:
        PlanError: Rank groups differ in their number of replicas.
    """
    counts = {mesh.replicas for mesh in setting.meshes}
    if len(counts) != 1:
        raise PlanError(f"all stages have equally many replicas, found {sorted(counts)}")
    return _Builder(lists, setting).build()


class _Builder:
    def __init__(self, lists: Sequence[Sequence[Instruction]], setting: Setting) -> None:
        self.lists, self.setting = lists, setting
        self.fabric = Fabric(setting.cluster, setting.calibration, setting.cores)
        split = setting.replicas > 1 and not replicas_alike(setting)
        self.replicas: list[int | None] = list(range(setting.replicas)) if split else [None]
        groups = range(len(setting.meshes))
        self.lanes = [(group, replica) for group in groups for replica in self.replicas]
        self.needs: list[Need] = []
        self.traffic = Traffic(setting.cluster.n_devices)
        self._of_mesh: list[Ints] = [np.array(mesh.devices) for mesh in setting.meshes]

    def build(self) -> Built:
        """The program."""
        computes = self._computes()
        steps = [self._once(lane, group, rep) for lane, (group, rep) in enumerate(self.lanes)]
        gathers = [self._gathers(group) for group, _ in self.lanes]
        buckets = [self._buckets(group, "sync") for group, _ in self.lanes]
        rounds = [self._buckets(group, "rounds") for group, _ in self.lanes]
        way_keys, ways = self._ways()
        tied = [self._tied(number) for number in range(len(self.setting.tied))]
        timed, resources = settle(self.needs)
        lanes = [
            LaneTimes(
                group=group,
                replica=replica or 0,
                compute={key: timed[at] for key, at in computes[lane].items()},
                optimizer=timed[steps[lane][0]],
                gather={stage: timed[at] for stage, at in gathers[lane].items()},
                globals=timed[steps[lane][1]],
                buckets={s: tuple(timed[at] for at in found) for s, found in buckets[lane].items()},
                rounds={s: tuple(timed[at] for at in found) for s, found in rounds[lane].items()},
                overhead=self.setting.overhead_s,
            )
            for lane, (group, replica) in enumerate(self.lanes)
        ]
        finished = {
            (*key, self.lanes[key[2]][1] or 0): replace(
                way, work=timed[at].seconds, uses=timed[at].uses
            )
            for key, (way, at) in zip(way_keys, ways, strict=True)
        }
        sums = [Tied(stages, timed[at]) for stages, at in tied]
        program = compile_program(self.lists, lanes, finished, self._norm(), sums, resources)
        return Built(
            program,
            lanes,
            [replica for _, replica in self.lanes],
            [self.setting.devices(*lane) for lane in self.lanes],
            self._comm_shares(),
            *self.traffic.tables(),
        )

    def _need(self, need: Need) -> int:
        self.needs.append(need)
        return len(self.needs) - 1

    # -- compute ----------------------------------------------------------------------------

    def _computes(self) -> list[dict[tuple[int, Kind], int]]:
        found: list[dict[tuple[int, Kind], int]] = []
        for lane, (group, replica) in enumerate(self.lanes):
            own: dict[tuple[int, Kind], int] = {}
            for stage in self.setting.stages_of(group):
                for kind, seconds, comm in kinds_of(self.setting, stage, replica):
                    need = self.fabric.compute(
                        ("lane", lane, 0),
                        self.setting.meshes[group],
                        self.setting.devices(group, replica),
                        seconds,
                        comm,
                    )
                    own[stage, kind] = self._need(need)
            found.append(own)
            self._count_collectives(group, replica)
        return found

    def _comm_shares(self) -> dict[tuple[int, int, Kind], float]:
        shares = {}
        for lane, (group, replica) in enumerate(self.lanes):
            for stage in self.setting.stages_of(group):
                for kind, seconds, comm in kinds_of(self.setting, stage, replica):
                    whole = seconds + total_s(comm)
                    shares[lane, stage, kind] = total_s(comm) / whole if whole > 0 else 0.0
        return shares

    def _count_collectives(self, group: int, replica: int | None) -> None:
        mesh = self.setting.meshes[group]
        done = {(now.stage, now.kind): 0 for now in self.lists[group]}
        for now in self.lists[group]:
            done[now.stage, now.kind] += 1
        for stage in self.setting.stages_of(group):
            for kind, _, comm in kinds_of(self.setting, stage, replica):
                self._count(
                    mesh, self.setting.devices(group, replica), comm, done.get((stage, kind), 0)
                )
            if replica in (None, 0):
                cost = self.setting.costs[stage]
                self._count(mesh, mesh.devices, (*cost.gather, *cost.sync), 1)
                self._count(mesh, mesh.devices, cost.rounds, self.setting.microbatches)

    def _count(
        self, mesh: MeshSlice, devices: Sequence[int], comm: Sequence[Collective], times: int
    ) -> None:
        if not times:
            return
        sizes = dict(mesh.named)
        sums: dict[int, tuple[float, float]] = {}  # tier → bytes and seconds of one device
        tiers = self.fabric.axis_tiers(mesh, comm)
        for one in comm:
            tier = tiers[one.axis]
            sent, busy = sums.get(tier, (0.0, 0.0))
            more = collective_bytes(one, sizes[one.axis])
            sums[tier] = sent + more * times, busy + one.seconds * times
        places = np.array(devices)
        for tier, (sent, busy) in sums.items():
            self.traffic.add(tier, places, sent, busy)

    # -- once a step ------------------------------------------------------------------------

    def _once(self, lane: int, group: int, replica: int | None) -> tuple[int, int]:
        """Indices of the needs of optimizer and globals."""
        setting = self.setting
        mesh, devices = setting.meshes[group], setting.devices(group, replica)
        costs = [setting.cost(s, replica) for s in setting.stages_of(group)]
        actor = ("lane", lane, 0)
        optimizer = sum(c.optimizer_s for c in costs)
        counting = sum(setting.globals_s.get(s, 0.0) for s in setting.stages_of(group))
        return (
            self._need(self.fabric.compute(actor, mesh, devices, optimizer)),
            self._need(self.fabric.compute(actor, mesh, devices, counting)),
        )

    def _gathers(self, group: int) -> dict[int, int]:
        """Stage → need of gathering its parameters, all replicas together."""
        mesh = self.setting.meshes[group]
        actor = ("sync", group, 0)
        return {
            stage: self._need(self.fabric.compute(actor, mesh, mesh.devices, 0.0, cost.gather))
            for stage in self.setting.stages_of(group)
            if (cost := self.setting.costs[stage]).gather
        }

    def _buckets(self, group: int, which: Literal["sync", "rounds"]) -> dict[int, list[int]]:
        """Stage → needs of its gradient buckets, all replicas together.

        Args:
            group: The rank group.
            which: The buckets of a step, or those of a microbatch.
        """
        mesh = self.setting.meshes[group]
        machine = machine_of(self.setting.cluster, mesh, self.setting.calibration)
        found = {}
        for stage in self.setting.stages_of(group):
            kinds: dict[tuple[str, str], int] = {}
            for one in getattr(self.setting.costs[stage], which):
                kinds[one.axis, one.kind] = kinds.get((one.axis, one.kind), 0) + one.nbytes
            total = max(kinds.values(), default=0)
            if not total:
                continue
            real = math.ceil(total / BUCKET_BYTES)
            played = min(real, MOST_BUCKETS)
            parts = [
                Collective(
                    axis,
                    kind,
                    nbytes // played,
                    machine.collective_s(axis, kind, nbytes / real) * real / played,
                )
                for (axis, kind), nbytes in kinds.items()
            ]
            need = self.fabric.compute(("sync", group, 0), mesh, mesh.devices, 0.0, parts)
            found[stage] = [self._need(need)] * played
        return found

    def _tied(self, number: int) -> tuple[tuple[int, ...], int]:
        """Gradients of one parameter over its rank groups: everybody's goes round to everybody."""
        stages, nbytes = self.setting.tied[number]
        groups = sorted({self.setting.io.rank_of[s] for s in stages})
        devices = tuple(d for g in groups for d in self.setting.meshes[g].devices)
        mesh = MeshSlice(devices, (len(devices),), (DATA,))
        machine = machine_of(self.setting.cluster, mesh, self.setting.calibration)
        seconds = machine.collective_s(DATA, ALL_REDUCE, nbytes)
        one = Collective(DATA, ALL_REDUCE, nbytes, seconds)
        self._count(mesh, devices, (one,), 1)
        need = self.fabric.compute(("tied", number, 0), mesh, devices, 0.0, (one,))
        return stages, self._need(need)

    def _norm(self) -> Timed:
        """One number, summed over all ranks."""
        devices = tuple(d for mesh in self.setting.meshes for d in mesh.devices)
        if len(devices) == 1:
            return Timed(0.0)
        mesh = MeshSlice(devices, (len(devices),), (DATA,))
        machine = machine_of(self.setting.cluster, mesh, self.setting.calibration)
        return Timed(machine.collective_s(DATA, ALL_REDUCE, NORM_BYTES))

    # -- transfers --------------------------------------------------------------------------

    def _ways(
        self,
    ) -> tuple[list[tuple[str, str, int, int]], list[tuple[Way, int]]]:
        """Keys of `compile_program` without the replica; per way its need."""
        keys: list[tuple[str, str, int, int]] = []
        ways: list[tuple[Way, int]] = []
        lane_of = {lane: index for index, lane in enumerate(self.lanes)}
        for kind, edge, a, b in edge_directions(self.setting.io):
            for replica in self.replicas:
                source, target = lane_of[a, replica], lane_of[b, replica]
                moved = self._tiles(edge, a, b, replica)
                after = self._sharing(edge, a, b, 0 if replica is None else replica)
                need = self.fabric.transfer(("pair", source, target), moved)
                way = Way(
                    source,
                    target,
                    0.0,
                    self.fabric.latency(moved),
                    (),
                    int(moved.nbytes.sum()),
                    after,
                )
                keys.append((kind, edge, source, target))
                ways.append((way, self._need(need)))
                self._sent(moved.moving())
        return keys, ways

    def _sent(self, moved: Tiles) -> None:
        tiers = self.fabric.tiers(moved)
        times = self.setting.microbatches
        busy = moved.nbytes / self.fabric.bandwidth[tiers, moved.sources] * times
        self.traffic.add(tiers, moved.sources, moved.nbytes * times, busy)

    def _tiles(self, edge: str, a: int, b: int, replica: int | None) -> Tiles:
        """What moves, in one replica or in all of them."""
        tiles = np.array(self.setting.moves(edge, a, b).tiles, dtype=np.int64).reshape(-1, 3)
        sources, targets = (
            self._places(group, replica)[:, tiles[:, end]].ravel()
            for end, group in enumerate((a, b))
        )
        return Tiles(sources, targets, np.tile(tiles[:, 2], len(sources) // max(1, len(tiles))))

    def _places(self, group: int, replica: int | None) -> Ints:
        """Devices of a rank group; shape (replicas or 1, positions)."""
        places = self._of_mesh[group].reshape(self.setting.replicas, -1)
        return places if replica is None else places[replica : replica + 1]

    def _sharing(self, edge: str, a: int, b: int, replica: int) -> float:
        """Seconds in which receivers share among themselves what they were sent."""
        moved = self.setting.moves(edge, a, b)
        if not moved.groups:
            return 0.0
        own = self.setting.devices(b, replica)
        longest = 0.0
        for group in moved.groups:
            mesh = MeshSlice(tuple(own[p] for p in group), (len(group),), (DATA,))
            machine = machine_of(self.setting.cluster, mesh, self.setting.calibration)
            longest = max(longest, machine.collective_s(DATA, ALL_GATHER, moved.shared))
        return longest
