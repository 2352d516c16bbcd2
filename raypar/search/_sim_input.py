"""What is simulated, apart from the lists: stages, costs, meshes, and what moves between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice
from raypar.schedules.compile import routes
from raypar.schedules.instructions import Kind
from raypar.schedules.io import StageIO
from raypar.search.cost.base import Collective, StageCost


@dataclass(frozen=True, slots=True)
class Moved:
    """What moves between the meshes of two rank groups, within one replica.

    Attributes:
        tiles: (position of the sender, position of the receiver, bytes).
        groups: Positions of receivers that share afterwards what each of them was sent.
        shared: Bytes that each of them holds in the end.
    """

    tiles: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, ...], ...] = ()
    shared: int = 0


Moves = Callable[[str, int, int], Moved]
"""(edge, sending rank group, receiving rank group) → what moves: its activation or, with the groups
the other way round, its gradient."""


@dataclass(frozen=True)
class Setting:
    """What is simulated, apart from the lists.

    Attributes:
        io: The plan's stages.
        meshes: Mesh of every rank group.
        costs: Cost of every stage on the slowest device of its mesh.
        cluster: Devices and links.
        calibration: What they reach.
        moves: What moves between positions of meshes.
        microbatches: M.
        cores: Cores that the ranks of each CPU node share; None: every device is one.
        tied: (stages that hold one parameter, bytes of its gradient), for every one that several
            rank groups hold.
        replica_costs: (stage, replica) → its cost, where replicas lie on unequal devices.
        local_bytes: (edge, rank group) → bytes of one rank's part of one microbatch; a missing one
            is the whole value.
        globals_s: Stage → seconds to count the whole batch.
        overhead_s: Seconds around every instruction that computes.
    """

    io: StageIO
    meshes: tuple[MeshSlice, ...]
    costs: tuple[StageCost, ...]
    cluster: Cluster
    calibration: Calibration
    moves: Moves
    microbatches: int
    cores: int | None = None
    tied: tuple[tuple[tuple[int, ...], int], ...] = ()
    replica_costs: Mapping[tuple[int, int], StageCost] = field(default_factory=dict)
    local_bytes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    globals_s: Mapping[int, float] = field(default_factory=dict)
    overhead_s: float = 0.0

    @property
    def replicas(self) -> int:
        """Replicas of every stage."""
        return self.meshes[0].replicas

    def devices(self, group: int, replica: int | None) -> tuple[int, ...]:
        """Devices of a rank group, or of one replica of it."""
        mesh = self.meshes[group]
        if replica is None:
            return mesh.devices
        size = len(mesh.devices) // mesh.replicas
        return mesh.devices[replica * size : (replica + 1) * size]

    def stages_of(self, group: int) -> list[int]:
        """Stages of a rank group."""
        return [s for s, g in enumerate(self.io.rank_of) if g == group]

    def cost(self, stage: int, replica: int | None) -> StageCost:
        """Cost of a stage on one replica, or on the slowest."""
        if replica is None:
            return self.costs[stage]
        return self.replica_costs.get((stage, replica), self.costs[stage])


def edge_directions(io: StageIO) -> list[tuple[str, str, int, int]]:
    """Every way that values take: (``F`` or ``B``, edge, sending and receiving rank group)."""
    found = []
    for way in routes(io):
        for group in way.heads:
            found.append(("F", way.edge.name, way.home, group))
            if way.edge.differentiable:
                found.append(("B", way.edge.name, group, way.home))
    return found


def replicas_alike(setting: Setting) -> bool:
    """Whether all replicas take the same time: equal devices, and links of equal kind."""
    stages = range(setting.io.n_stages)
    replicas = setting.replicas
    if any(setting.cost(s, r) != setting.cost(s, 0) for s in stages for r in range(1, replicas)):
        return False
    nodes = setting.cluster.nodes
    node_of = np.repeat(np.arange(len(nodes)), setting.cluster.shape)
    kinds = _numbers(node.device.name for node in nodes)[node_of]
    inside, across = (_numbers(getattr(n, tier) for n in nodes) for tier in ("inside", "across"))
    places = [np.array(mesh.devices).reshape(replicas, -1) for mesh in setting.meshes]
    if not all(_rows_equal(kinds[own]) for own in places):
        return False
    for _, edge, a, b in edge_directions(setting.io):
        tiles = np.array(setting.moves(edge, a, b).tiles, dtype=np.int64).reshape(-1, 3)
        ends = places[a][:, tiles[:, 0]], places[b][:, tiles[:, 1]]
        near = node_of[ends[0]] == node_of[ends[1]]
        # A link inside a node is that node's; one between nodes depends on both.
        for own in (
            near,
            ends[0] == ends[1],
            *(np.where(near, inside[node_of[end]], across[node_of[end]]) for end in ends),
        ):
            if not _rows_equal(own):
                return False
    return True


def _numbers(values: Iterable[object]) -> npt.NDArray[np.int64]:
    """Equal numbers for equal values."""
    known: dict[object, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values])


def _rows_equal(rows: npt.NDArray[Any]) -> bool:
    return bool((rows == rows[:1]).all())


def kinds_of(
    setting: Setting, stage: int, replica: int | None
) -> list[tuple[Kind, float, tuple[Collective, ...]]]:
    """(kind, seconds of compute, collectives) of a stage.

    A stage whose backward does not divide does all of it in the input half.
    """
    cost = setting.cost(stage, replica)
    whole = (cost.backward_s, cost.backward_comm)
    halves = (
        (cost.backward_input_s, cost.backward_input_comm),
        (cost.backward_weight_s, cost.backward_weight_comm),
    )
    first, second = halves if setting.io.splits[stage] else (whole, (0.0, ()))
    return [
        (Kind.FORWARD, cost.forward_s, cost.forward_comm),
        (Kind.BACKWARD, *whole),
        (Kind.BACKWARD_INPUT, *first),
        (Kind.BACKWARD_WEIGHT, *second),
    ]
