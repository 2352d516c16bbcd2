"""Planner `exhaustive`: every plan of a tiny space, each played.

A plan of the space has stages that are runs of units (`raypar.search.interop.units`), dealt out to
rank groups in turn (more than one stage a group: interleaved); rank groups of any sizes, which take
the devices node by node, on unequal nodes in every order of the nodes; and any replicas,
microbatches, mesh shape of a group, schedule, and recomputation and ZeRO level of a stage. How ops
are sharded is not enumerated: a mesh shape comes with what the intra-op program finds in each of
its modes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from raypar.errors import NothingFitsError, PlanError, ScheduleError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan, with_schedule
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import (
    DATA,
    RECOMPUTE_POLICIES,
    MemoryPolicy,
    MeshSlice,
    Plan,
    ScheduleSpec,
    StagePlan,
)
from raypar.schedules.registry import schedule_names
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import Entry, entry_of, winner
from raypar.search.interop.space import AXIS_NAMES, Split, check_options, mesh_shapes, splits
from raypar.search.interop.ways import op_sharding
from raypar.search.interop.workbench import Workbench
from raypar.search.planners.base import Planner, register_planner
from raypar.search.simulate import simulate
from raypar.sharding.strategies import fold_patterns

MOST_PLANS = 20_000
"""Spaces of more plans are refused, unless `search.trials` allows more."""
_KEPT = 9
_MOST_CHUNKS = 4


@register_planner
class ExhaustivePlanner(Planner):
    """Plays every plan, where there are few."""

    name = "exhaustive"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """The fastest plan of the space that fits the memory; see `Planner.plan`.

        Raises:
            PlanError: There are more plans than `MOST_PLANS` or `config.trials`; none fits.
        """
        return ExhaustiveSearch(graph, cluster, config).run()


@dataclass(frozen=True)
class _Outline:
    """A plan before cuts, meshes and policies are chosen.

    Attributes:
        split: How the batch is cut.
        sizes: Devices of one replica of each rank group.
        chunks: Stages of each rank group.
        line: Devices in the order in which groups take them.
    """

    split: Split
    sizes: tuple[int, ...]
    chunks: int
    line: tuple[int, ...]

    @property
    def stages(self) -> int:
        """S."""
        return len(self.sizes) * self.chunks

    def devices(self, group: int) -> tuple[int, ...]:
        """Devices of a rank group, replica by replica."""
        at = sum(self.sizes[:group]) * self.split.replicas
        return self.line[at : at + self.sizes[group] * self.split.replicas]


@dataclass(frozen=True)
class _Face:
    """A mesh shape with a sharding for it."""

    shape: tuple[int, ...]
    modes: tuple[str, ...]


class ExhaustiveSearch:
    """One search.

    Args:
        graph: The captured model.
        cluster: The devices.
        config: What is fixed; ``chunks: 1`` leaves the chunks open.
        calibration: What the cluster reaches; None: what is on disk for it, else the device table.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        config: SearchConfig,
        calibration: Calibration | None = None,
    ) -> None:
        check_options(graph, cluster, replace(config, chunks=1))
        least = 1 if config.stages == "auto" else config.stages
        self.graph, self.cluster, self.config = graph, cluster, config
        self.bench = Workbench(graph, cluster, config, calibration, least=least)
        self.units = self.bench.units
        self.played = 0

    def run(self) -> Plan:
        """Plays every plan.

        Raises:
            PlanError: There are too many, or none fits.
        """
        self._check_count()
        entries: list[Entry] = []
        for entry in self.entries():
            if entry.overfull <= 1.0:
                entries.append(entry)
                entries.sort(key=lambda e: e.step_s)
                del entries[_KEPT:]
        if not entries:
            raise NothingFitsError("no plan of those that planner exhaustive tries fits the memory")
        plan = winner(entries)
        check_plan(plan, self.graph, self.cluster)
        return plan

    def count(self) -> int:
        """How many plans there are, those that turn out to be the same included."""
        return sum(self._count(outline) for outline in self.outlines())

    def _check_count(self) -> None:
        limit = MOST_PLANS if self.config.trials == "auto" else self.config.trials
        total = 0
        for outline in self.outlines():
            total += self._count(outline)
            if total > 1000 * limit:
                break
        if total > limit:
            more = "more than " if total > 1000 * limit else ""
            open_ = [k for k in _OPEN if getattr(self.config, k) == "auto"]
            enough = f"set search.trials: {total}, " if total <= 10 * MOST_PLANS else ""
            raise PlanError(
                f"planner exhaustive would play {more}{total:,} plans of {len(self.units)} units "
                f"on {self.cluster.n_devices} devices, and plays up to {limit:,}: fix some of "
                f"search.{', search.'.join(open_)} (recompute: none and zero: 0 spare most), "
                f"{enough}or take search.planner: optuna"
            )

    def outlines(self) -> Iterator[_Outline]:
        """Every way to cut the batch and to deal out devices to rank groups."""
        config, most = self.config, len(self.units)
        for split in self._splits():
            for sizes in _compositions(split.devices, most):
                if config.tensor != "auto" and set(sizes) != {config.tensor}:
                    continue
                for chunks in self._chunks(len(sizes)):
                    if config.stages in ("auto", len(sizes) * chunks):
                        for line in self._lines():
                            yield _Outline(split, sizes, chunks, line)

    def _splits(self) -> Iterator[Split]:
        """Every way to cut the batch, also those that leave devices idle."""
        graph, config, total = self.graph, self.config, self.cluster.n_devices
        next(splits(graph, self.cluster, config))  # says what is wrong where there is none
        batch = graph.global_batch
        for replicas in range(1, min(total, graph.max_replicas) + 1):
            if batch % replicas or config.replicas not in ("auto", replicas):
                continue
            share = batch // replicas
            for parts in range(1, share + 1):
                told = 1 if graph.feels_microbatches else parts  # M is the user's there
                wanted = told if config.microbatches == "auto" else config.microbatches
                if share % parts == 0 and parts == wanted:
                    yield Split(replicas, parts, share // parts, total // replicas)

    def _chunks(self, groups: int) -> Sequence[int]:
        if self.config.chunks != 1:
            return (self.config.chunks,) if groups * self.config.chunks <= len(self.units) else ()
        most = len(self.units) // groups if groups > 1 else 1
        return range(1, min(most, _MOST_CHUNKS) + 1)

    def _lines(self) -> list[tuple[int, ...]]:
        """Orders of the devices: on unequal nodes, every order of the nodes."""
        if self.bench.alike:
            return [tuple(self.bench.line)]
        nodes, first = [], 0
        for node in self.cluster.nodes:
            look = (node.device, node.devices, node.inside, node.across, node.device_memory)
            nodes.append((look, tuple(range(first, first + node.devices))))
            first += node.devices
        found: dict[object, tuple[int, ...]] = {}
        for order in itertools.permutations(nodes):
            line = tuple(d for _, devices in order for d in devices)
            found.setdefault(tuple(repr(look) for look, _ in order), line)
        return list(found.values())

    # -- what is open in an outline ---------------------------------------------------------

    def _count(self, outline: _Outline) -> int:
        cuts = math.comb(len(self.units) - 1, outline.stages - 1)
        faces = math.prod(len(self._faces(size)) for size in outline.sizes)
        policies = math.prod(
            len(self._policies(outline, group)) ** outline.chunks
            for group in range(len(outline.sizes))
        )
        return cuts * faces * policies * len(self._schedules(outline))

    def _faces(self, size: int) -> list[_Face]:
        if self.config.tensor == "auto":
            shapes = mesh_shapes(size, self.bench.per_node)
        else:
            shapes = [(size,)] if size > 1 else [()]
        return [_Face(shape, modes) for shape in shapes for modes in _modes(shape)]

    def _policies(self, outline: _Outline, group: int) -> list[MemoryPolicy]:
        config = self.config
        recompute = RECOMPUTE_POLICIES if config.recompute == "auto" else (config.recompute,)
        zero: Sequence[int] = (0,)
        if config.zero != "auto":
            zero = (config.zero,)
        elif outline.split.replicas * outline.sizes[group] > 1:
            zero = range(4)
        return [MemoryPolicy(policy, level) for policy in recompute for level in zero]

    def _schedules(self, outline: _Outline) -> list[str]:
        if self.config.schedule != "auto":
            return [self.config.schedule]
        return ["1f1b"] if outline.stages == 1 else list(schedule_names())

    # -- playing ----------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """Every plan of the space, played; those that do not fit the memory included."""
        for outline in self.outlines():
            for plan in self._plans(outline):
                lowered: LoweredPlan | None = None
                for name in self._schedules(outline):
                    spec = ScheduleSpec(name, plan.schedule.placement)
                    tried = replace(plan, schedule=spec)
                    try:
                        if lowered is None:
                            lowered = lower_plan(self.graph, tried)
                        else:
                            lowered = with_schedule(lowered, name, plan.microbatches)
                    except ScheduleError:
                        continue
                    yield self._play(tried, lowered)

    def _play(self, plan: Plan, lowered: LoweredPlan) -> Entry:
        self.played += 1
        played = simulate(
            self.graph,
            plan,
            self.cluster,
            calibration=self.bench.calibration,
            lowered=lowered,
            optimizer_states=self.config.optimizer_states,
        )
        return entry_of(plan, played, self.config.memory_fraction)

    def _plans(self, outline: _Outline) -> Iterator[Plan]:
        """Every plan of an outline, with the first of its schedules."""
        groups = range(len(outline.sizes))
        placement = tuple((s % len(groups), s // len(groups)) for s in range(outline.stages))
        inner = range(1, len(self.units))
        faces = [self._sharded(outline, group) for group in groups]
        policies = [self._policies(outline, group) for group, _ in placement]
        for cuts in itertools.combinations(inner, outline.stages - 1):
            bounds = [self.units.bounds[u] for u in (0, *cuts, len(self.units))]
            for chosen in itertools.product(*faces):
                for memory in itertools.product(*policies):
                    stages = [
                        self._stage(outline, group, chosen[group], bounds[s : s + 2], memory[s])
                        for s, (group, _) in enumerate(placement)
                    ]
                    yield self._plan(outline, stages, placement)

    def _sharded(
        self, outline: _Outline, group: int
    ) -> list[tuple[tuple[int, ...], dict[str, str]]]:
        """(mesh shape, sharding of all ops) of a rank group; equal ones once."""
        found: dict[object, tuple[tuple[int, ...], dict[str, str]]] = {}
        for face in self._faces(outline.sizes[group]):
            texts = self.bench.maker.sharding(
                outline.split, face.shape, face.modes, outline.devices(group)
            )
            exact = op_sharding(texts, self.units, self.graph)
            found.setdefault((face.shape, tuple(sorted(exact.items()))), (face.shape, exact))
        return list(found.values())

    def _stage(
        self,
        outline: _Outline,
        group: int,
        sharded: tuple[tuple[int, ...], dict[str, str]],
        bounds: Sequence[int],
        memory: MemoryPolicy,
    ) -> StagePlan:
        shape, exact = sharded
        ops = self.graph.ops[bounds[0] : bounds[1]]
        mesh = MeshSlice(
            outline.devices(group),
            (outline.split.replicas, *shape),
            (DATA, *AXIS_NAMES[: len(shape)]),
        )
        return StagePlan(
            first=ops[0].id,
            last=ops[-1].id,
            mesh=mesh,
            memory=memory,
            sharding=fold_patterns(exact, [op.id for op in ops]),
        )

    def _plan(
        self,
        outline: _Outline,
        stages: Sequence[StagePlan],
        placement: tuple[tuple[int, int], ...],
    ) -> Plan:
        return Plan.of(
            self.graph,
            self.cluster,
            stages,
            microbatches=outline.split.microbatches,
            schedule=self._schedules(outline)[0],
            placement=placement,
            planner=ExhaustivePlanner.name,
        )


_OPEN = ("stages", "replicas", "tensor", "microbatches", "schedule", "recompute", "zero")


def _modes(shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """What the intra-op program may do on each axis of a mesh (`raypar.search.intra.allowed`)."""
    return [("free",), ("tensor",)] if len(shape) == 1 else [("free",) * len(shape)]


def _compositions(devices: int, most: int) -> Iterator[tuple[int, ...]]:
    """Sizes of up to `most` rank groups that take at most `devices` devices."""
    if most < 1:
        return
    for first in range(1, devices + 1):
        yield (first,)
        for rest in _compositions(devices - first, most - 1):
            yield (first, *rest)
