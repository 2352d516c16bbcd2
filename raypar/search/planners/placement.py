"""Planner `placement`: units placed on rank groups so that the fullest one has least to do.

The max-load split of Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of DNN Graph
Operators" (NeurIPS), on a captured model: a rank group is one device (or `search.tensor` of them)
in every replica. The best split along the model, the best contiguous split of its branches and the
best placement of any form that local search finds become plans; a rank group whose units do not
follow each other holds several stages. The published model knows neither the filling of the
pipeline nor what a schedule hides, so that the plans are played, and the fastest one wins.

Where devices differ, all are taken to be as the slowest.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.exact.placement_chain import chain_split
from raypar.search.exact.placement_contiguous import best_contiguous
from raypar.search.exact.placement_local import local_search
from raypar.search.exact.placement_problem import PlacementProblem, by_item, by_node
from raypar.search.exact.placement_reduce import reduced
from raypar.search.interop.contest import best_that_fits
from raypar.search.interop.pipeline import Stage, Way
from raypar.search.interop.space import Split, check_options, splits
from raypar.search.interop.unit_graph import unit_problem
from raypar.search.interop.workbench import MOST_STAGES, Workbench
from raypar.search.planners.base import Planner, register_planner

_LOOKED_AT = 4  # ways to cut the batch whose placements are searched
_STEPS = 10_000  # of local search, per level
_DOWNSETS = 5_000  # of one window
_PATIENCE_S = 20.0  # for one placement; it takes far less on a machine that is not busy


@register_planner
class PlacementPlanner(Planner):
    """Balances rank groups, with stages of any number on each."""

    name = "placement"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """The fastest of the placements found; see `Planner.plan`."""
        return PlacementSearch(graph, cluster, config).run()


@dataclass(frozen=True)
class Outline:
    """What is decided before units are placed.

    Attributes:
        split: How the batch is cut.
        size: Devices of a rank group in one replica.
        groups: Rank groups.
        way: How a rank group runs any unit.
        step_s: About the seconds of a step, by the split along the model.
        device_of: That split: rank group of every unit.
    """

    split: Split
    size: int
    groups: int
    way: Way
    step_s: float
    device_of: tuple[int, ...]


class PlacementSearch:
    """One search.

    Args:
        graph: The captured model.
        cluster: The devices.
        config: What is fixed and what is free.
        calibration: What the cluster reaches; None: what is on disk for it, else the device table.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        config: SearchConfig,
        calibration: Calibration | None = None,
    ) -> None:
        if config.chunks != 1:
            raise PlanError(
                f"search.chunks is {config.chunks}, but planner placement finds out itself how "
                "many stages a rank group has: leave it at 1, or set search.planner: uniform"
            )
        check_options(graph, cluster, config)
        self.graph, self.cluster, self.config = graph, cluster, config
        least = 1 if config.stages == "auto" else config.stages
        self.bench = Workbench(graph, cluster, config, calibration, least=least)

    def run(self) -> Plan:
        """Searches, and plays what was found to choose by exact figures.

        Raises:
            PlanError: The options leave nothing, or nothing fits the memory.
        """
        return best_that_fits(
            lambda share: list(self.plans(share)),
            self.graph,
            self.cluster,
            self.config,
            self.bench.calibration,
        )

    def plans(self, share: float = 1.0) -> Iterator[Plan]:
        """Plans to play, the most promising outline's first.

        Args:
            share: Of the memory that may be filled.
        """
        best: dict[Split, Outline] = {}
        for outline in sorted(self.outlines(share), key=lambda outline: outline.step_s):
            best.setdefault(outline.split, outline)
        known: set[tuple[object, ...]] = set()
        for outline in list(best.values())[:_LOOKED_AT]:
            for device_of in self.placements(outline, share):
                plan = self.plan_of(outline, device_of)
                key = (plan.microbatches, *((s.first, s.mesh, s.memory) for s in plan.stages))
                if key not in known and self.config.stages in ("auto", len(plan.stages)):
                    known.add(key)
                    yield plan

    def outlines(self, share: float = 1.0) -> Iterator[Outline]:
        """Every way to cut the batch and to run units that a split along the model fits."""
        size = 1 if self.config.tensor == "auto" else self.config.tensor
        most = min(len(self.bench.units), MOST_STAGES)
        for split in splits(self.graph, self.cluster, self.config):
            there = split.devices // size
            if self.config.stages == "auto":
                counts = [min(there, most)]
            else:
                counts = [self.config.stages] if self.config.stages <= there else []
            for groups, way in itertools.product(counts, self._ways(split, size)):
                if groups < 1:
                    continue
                problem = self._problem(split, way, groups, size, share)
                load, device_of = chain_split(
                    problem, range(problem.n_items), use_all=self.config.stages != "auto"
                )
                if math.isfinite(load):
                    stages = len(set(device_of))
                    # Once full, a pipeline takes the fullest group's time for every microbatch.
                    fill = float(problem.accelerator_s.sum()) - load if stages > 1 else 0.0
                    step_s = load * split.microbatches + fill
                    yield Outline(split, size, groups, way, step_s, tuple(device_of))

    def placements(self, outline: Outline, share: float = 1.0) -> Iterator[tuple[int, ...]]:
        """Rank group of every unit: along the model, contiguous over its branches, of any form."""
        yield outline.device_of
        if outline.groups < 2:
            return
        problem = self._problem(outline.split, outline.way, outline.groups, outline.size, share)
        split = best_contiguous(problem, _PATIENCE_S, most=_DOWNSETS)
        best = outline.device_of
        if split.objective < problem.objective(best):
            best = tuple(by_item(problem, split.device_of))
            yield best
        smaller = reduced(problem, problem.objective(best), contiguous=False)
        start = by_item(smaller, dict(enumerate(best)))
        if not smaller.fits(start):
            return
        found = local_search(
            smaller, start, time.monotonic() + _PATIENCE_S, _STEPS, self.config.seed
        )
        if found.objective < problem.objective(best):
            nodes = by_node(smaller, found.device_of)
            yield tuple(nodes[unit] for unit in range(problem.n_items))

    def plan_of(self, outline: Outline, device_of: Sequence[int]) -> Plan:
        """The plan of a placement: units that follow each other on a rank group are a stage.

        Args:
            outline: What was decided before.
            device_of: Rank group of every unit; numbered anew as the stages meet them.
        """
        number: dict[int, int] = {}
        chunks: dict[int, int] = {}
        stages: list[Stage] = []
        placement: list[tuple[int, int]] = []
        seconds = outline.way.seconds
        first = 0
        for device, run in itertools.groupby(device_of):
            last = first + len(list(run))
            group = number.setdefault(device, len(number))
            chunk = chunks.get(group, 0)
            chunks[group] = chunk + 1
            placement.append((group, chunk))
            stages.append(
                Stage(
                    first,
                    last,
                    outline.size,
                    group * outline.size,
                    outline.way,
                    float(seconds[first:last].sum()),
                )
            )
            first = last
        schedule = self.config.schedule
        if schedule == "auto":
            schedule = "1f1b" if len(stages) == len(number) else "interleaved_1f1b"
        return self.bench.plan_of(
            outline.split,
            stages,
            schedule,
            planner=PlacementPlanner.name,
            placement=placement,
            predicted={"step_s": outline.step_s},
        )

    def _problem(
        self, split: Split, way: Way, groups: int, size: int, share: float
    ) -> PlacementProblem:
        problem = unit_problem(self.bench, split, way, groups, size)
        return replace(problem, memory=problem.memory * share)

    def _ways(self, split: Split, size: int) -> list[Way]:
        """Ways of the slowest devices, within the least memory of all."""
        width = split.replicas * size
        last = len(self.bench.line) - width
        starts = [0] if self.bench.alike else range(0, last + 1, width)
        found = [self.bench.maker.ways(split, size, self.bench.line[at:][:width]) for at in starts]
        memory = min((way.memory for ways in found for way in ways), default=0.0)
        slowest = max(found, key=lambda ways: min(float(way.seconds.sum()) for way in ways))
        return [replace(way, memory=memory) for way in slowest]
