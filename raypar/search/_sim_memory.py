"""What a rank holds, from the beginning of a step to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raypar.schedules.compile import GRAD
from raypar.schedules.instructions import COMPUTE, RECV, SEND, Instruction, Kind
from raypar.search._sim_build import Built
from raypar.search._sim_input import Setting
from raypar.search._sim_run import Played

RESIDENT = ("parameters", "optimizer", "buffers", "overhead")
MOVING = ("saved", "edges", "gradients", "transit", "transient")
_SAVED, _EDGES, _GRADIENTS, _TRANSIT, _TRANSIENT = range(5)


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes that each rank of a lane holds over time.

    Attributes:
        resident: Held all the time: ``parameters``, ``optimizer``, ``buffers`` and ``overhead``
            (fragmentation, libraries), in bytes.
        peak_bytes: The most held at once.
        peak_s: When, in seconds from the beginning of the step.
        peak_parts: What was held then, by name; adds up to `peak_bytes`.
        saved_peak: Stage → most bytes held for its backward at once.
        times: When what is held changes, in seconds.
        moving: One row for each of `MOVING`: ``saved`` activations (less what is held as an edge
            or for another stage as well: one tensor counts once), ``edges`` (values that cross
            stages and their gradients), ``gradients`` of parameters (from the first backward of
            their stage to the optimizer, which begins the next step), ``transit`` (what has
            arrived and was not yet asked for, updated parameters included, or is done with and
            not yet gone) and ``transient``
            (within one program): bytes from each time on.
    """

    resident: dict[str, int]
    peak_bytes: int
    peak_s: float
    peak_parts: dict[str, int]
    saved_peak: dict[int, int]
    times: np.ndarray = field(repr=False)
    moving: np.ndarray = field(repr=False)

    @property
    def held(self) -> np.ndarray:
        """Bytes held from each of `times` on."""
        total: np.ndarray = self.moving.sum(axis=0) + sum(self.resident.values())
        return total


def memory_of(
    lane: int, program: Sequence[Instruction], setting: Setting, built: Built, played: Played
) -> MemoryTimeline:
    """The memory of one rank of a lane.

    Args:
        lane: Which lane.
        program: The list of its rank group.
        setting: What is simulated.
        built: The program that was played.
        played: When everything happened.
    """
    walk = _Walk(lane, setting, built, played)
    for position, now in enumerate(program):
        walk.step(position, now)
    return walk.timeline()


class _Walk:
    def __init__(self, lane: int, setting: Setting, built: Built, played: Played) -> None:
        self.lane, self.setting, self.built, self.played = lane, setting, built, played
        self.group = built.lanes[lane].group
        self.replica = built.lane_replicas[lane]
        self.ends = played.ends[lane]
        self.last = built.program.last_op[lane]
        self.ops = built.program.ops[lane]
        self.stages = setting.stages_of(self.group)
        self.costs = {s: setting.cost(s, self.replica) for s in self.stages}
        self.sizes = _edge_sizes(setting, self.group)
        self.made: dict[int, list[str]] = {s: [] for s in self.stages}
        self.read: dict[int, list[str]] = {s: [] for s in self.stages}
        for edge in setting.io.edges:
            if edge.source in self.made:
                self.made[edge.source].append(edge.name)
            if edge.differentiable:
                for target in edge.targets:
                    if target in self.read:
                        self.read[target].append(edge.name)
        self.held: set[tuple[str, int]] = set()
        self.leaves: dict[tuple[str, int], float] = {}
        self.counts = dict.fromkeys(self.stages, (0, 0))
        self.saved_peak = dict.fromkeys(self.stages, 0)
        self.holders: dict[tuple[str, int], int] = {}  # (edge, microbatch) → who holds its tensor
        self.without = {s for s in self.stages if self.costs[s].gradient_bytes}
        """Stages whose gradients do not exist yet."""
        self.changes: list[tuple[float, int, int]] = []  # (time, which of MOVING, bytes)
        total = sum(c.gradient_bytes for c in self.costs.values())
        self.changes += [(0.0, _GRADIENTS, total), (self.ends[0], _GRADIENTS, -total)]
        self.arriving = {s: sum(g.nbytes for g in c.gather) for s, c in self.costs.items()}
        """Stage → bytes of updated parameters that wait beside the old ones."""
        self.changes.append((0.0, _TRANSIT, sum(self.arriving.values())))

    def step(self, position: int, now: Instruction) -> None:
        """What one instruction changes."""
        kind, stage, mb = now.kind, now.stage, now.microbatch
        if stage is None or mb is None:
            return
        op = self.last[position]
        end = self.ends[op]
        if kind in COMPUTE:
            before = self.last[position - 1] if position else 0
            if kind is Kind.FORWARD and (size := self.arriving.pop(stage, 0)):
                self.changes.append((self.ends[before], _TRANSIT, -size))
            self._compute(kind, stage, mb, self.ends[before], end)
            self._gradients(kind, stage, self.ends[before], end)
        elif kind in RECV:
            assert now.value is not None
            name = now.value if kind is Kind.RECV_FORWARD else GRAD + now.value
            arrived, size = self.played.arrived[self.ops[op][1]], self.sizes[now.value]
            if arrived < end:
                self.changes += [(arrived, _TRANSIT, size), (end, _TRANSIT, -size)]
            self._take(name, mb, end)
        elif kind in SEND:
            assert now.value is not None
            name = now.value if kind is Kind.SEND_FORWARD else GRAD + now.value
            gone = self.played.arrived[self.ops[op][1]]
            self.leaves[name, mb] = max(self.leaves.get((name, mb), 0.0), gone)
        elif kind is Kind.FREE and now.value is not None:
            key = (now.value, mb)
            if key in self.held:
                self.held.remove(key)
                size = self.sizes[now.value.removeprefix(GRAD)]
                self.changes.append((end, _EDGES, -size))
                self._drop(key, end)
                gone = self.leaves.pop(key, 0.0)
                if gone > end:
                    self.changes += [(end, _TRANSIT, size), (gone, _TRANSIT, -size)]

    def _take(self, name: str, mb: int, time: float) -> None:
        if (name, mb) not in self.held:
            self.held.add((name, mb))
            self._share((name, mb), time)
            self.changes.append((time, _EDGES, self.sizes[name.removeprefix(GRAD)]))

    def _compute(self, kind: Kind, stage: int, mb: int, start: float, end: float) -> None:
        cost = self.costs[stage]
        peak = cost.forward_peak_bytes if kind is Kind.FORWARD else cost.backward_peak_bytes
        halves = self.setting.io.splits[stage]
        if peak:
            self.changes.append((start, _TRANSIENT, peak))
            self.changes.append((end, _TRANSIENT, -peak))
        if kind is Kind.FORWARD:
            self._keep(stage, end, 1, 0)
            for name in cost.saved_edges:
                self._share((name, mb), end)
            for name in self.made[stage]:
                self._take(name, mb, end)
            return
        if kind is Kind.BACKWARD_WEIGHT:
            if halves:
                self._keep(stage, end, 0, -1)
                for name in cost.half_edges:
                    self._drop((name, mb), end)
            return
        later = kind is Kind.BACKWARD_INPUT and halves
        self._keep(stage, end, -1, int(later))
        for name in cost.half_edges if later else ():
            self._share((name, mb), end)
        for name in cost.saved_edges:
            self._drop((name, mb), end)
        for name in self.read[stage]:
            self._take(GRAD + name, mb, end)

    def _gradients(self, kind: Kind, stage: int, start: float, end: float) -> None:
        """The first gradients of a stage come to be while a backward runs, and stay."""
        last = Kind.BACKWARD_WEIGHT if self.setting.io.splits[stage] else Kind.BACKWARD_INPUT
        if kind not in (Kind.BACKWARD, last) or stage not in self.without:
            return
        self.without.remove(stage)
        size = self.costs[stage].gradient_bytes
        self.changes += [(start, _TRANSIENT, size), (end, _TRANSIENT, -size)]
        self.changes.append((end, _GRADIENTS, size))

    def _share(self, key: tuple[str, int], time: float) -> None:
        """One more holds this value; all after the first hold the same tensor."""
        self.holders[key] = known = self.holders.get(key, 0) + 1
        size = self.sizes.get(key[0])  # None of a gradient: it is nobody's but the edge's
        if known > 1 and size:
            self.changes.append((time, _SAVED, -size))

    def _drop(self, key: tuple[str, int], time: float) -> None:
        self.holders[key] = known = self.holders[key] - 1
        size = self.sizes.get(key[0])
        if known > 0 and size:
            self.changes.append((time, _SAVED, size))

    def _keep(self, stage: int, time: float, whole: int, half: int) -> None:
        cost = self.costs[stage]
        counts = self.counts[stage]
        self.counts[stage] = counts = (counts[0] + whole, counts[1] + half)
        more = whole * cost.saved_bytes + half * cost.half_bytes
        if more:
            self.changes.append((time, _SAVED, more))
        now = counts[0] * cost.saved_bytes + counts[1] * cost.half_bytes
        self.saved_peak[stage] = max(self.saved_peak[stage], now)

    def timeline(self) -> MemoryTimeline:
        """All changes in order of time."""
        # Changes at one time keep the list's order: workspace is gone, results take its place.
        when, which, sizes = zip(*self.changes, strict=True)
        order = np.argsort(when, kind="stable")
        times = np.concatenate([[0.0], np.array(when, dtype=np.float64)[order]])
        moving = np.zeros((len(MOVING), len(order) + 1), dtype=np.int64)
        places = np.arange(1, len(order) + 1)
        moving[np.array(which)[order], places] = np.array(sizes, dtype=np.int64)[order]
        moving = moving.cumsum(axis=1)
        resident = self._resident()
        held = moving.sum(axis=0)
        top = int(held.argmax())
        parts = {**resident, **{n: int(moving[i, top]) for i, n in enumerate(MOVING)}}
        return MemoryTimeline(
            resident,
            sum(parts.values()),
            float(times[top]),
            parts,
            self.saved_peak,
            times,
            moving,
        )

    def _resident(self) -> dict[str, int]:
        costs = self.costs.values()
        sizes = (
            sum(c.param_bytes for c in costs),
            sum(c.optimizer_bytes for c in costs),
            sum(c.buffer_bytes for c in costs),
            sum(c.overhead_bytes for c in costs),
        )
        return dict(zip(RESIDENT, sizes, strict=True))


def _edge_sizes(setting: Setting, group: int) -> dict[str, int]:
    """Edge → bytes of one rank's part of it for one microbatch."""
    return {
        edge.name: setting.local_bytes.get((edge.name, group), edge.nbytes)
        for edge in setting.io.edges
    }
