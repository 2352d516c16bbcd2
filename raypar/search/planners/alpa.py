"""Planner `alpa`: where to cut, on which meshes, and how to shard, searched on two levels.

The outer level goes over replicas, microbatch sizes and mesh sizes; for each, dynamic programming
finds the stages (`raypar.search.interop.pipeline`), whose costs come from the intra-op integer
program on every mesh shape (`raypar.search.interop.ways`). After Zheng et al. 2022, "Alpa:
Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning", sections 4 and 5;
beyond it: microbatch count, ZeRO level, recomputation and stage-to-stage traffic are part of the
search, devices may differ, some may stay idle, and what is found is simulated before it is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.bounds.memory import usable_bytes
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import best_that_fits, most_played
from raypar.search.interop.pipeline import Pipeline, Places, Tables, best_pipeline
from raypar.search.interop.space import (
    MIXED_SLOTS,
    Split,
    check_options,
    splits,
    stage_sizes,
)
from raypar.search.interop.ways import ANY, Wish
from raypar.search.interop.workbench import MOST_STAGES, Workbench
from raypar.search.need import state_bytes
from raypar.search.planners.base import Planner, register_planner

_KEPT = 8  # pipelines that are looked at closely
_TIGHT, _ABOUT = 0.4, 1.1
"""Of all memory, filled by parameters, gradients and optimizer states alone: beyond that, bounds of
the time count as equal within such a factor."""


@dataclass(frozen=True)
class Candidate:
    """A pipeline with the split it belongs to."""

    split: Split
    pipeline: Pipeline

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step, by the search's own quick figures."""
        return self.pipeline.step_s


@register_planner
class AlpaPlanner(Planner):
    """Searches stages, meshes, shardings, microbatches, ZeRO levels and recomputation."""

    name = "alpa"
    obeys_budget = True

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """The fastest plan that is found; see `Planner.plan`."""
        return AlpaSearch(graph, cluster, config).run()


class AlpaSearch:
    """One search.

    Args:
        graph: The captured model.
        cluster: The devices.
        config: What is fixed and what is free.
        calibration: What the cluster reaches; None: what is on disk for it, else the device table.
    """

    planner = AlpaPlanner.name

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        config: SearchConfig,
        calibration: Calibration | None = None,
    ) -> None:
        check_options(graph, cluster, config)
        least = 1 if config.stages == "auto" else config.stages
        self.bench = Workbench(graph, cluster, config, calibration, least=least)
        self.graph = graph
        self.cluster = cluster
        self.config = config
        self.most_stages = max(MOST_STAGES, least)
        self.kept: list[Candidate] = []
        room = sum(usable_bytes(cluster, self.bench.calibration, config))
        self._tight = state_bytes(graph, config) > _TIGHT * room
        self._before: Candidate | None = None  # the best of a search with more memory
        budget_s = float("inf") if config.budget_s == "auto" else config.budget_s
        self._deadline = time.perf_counter() + budget_s

    def run(self) -> Plan:
        """Searches, and plays what was found to choose by exact figures.

        Raises:
            PlanError: The options leave nothing, or nothing fits the memory.
        """
        return best_that_fits(
            self._plans,
            self.graph,
            self.cluster,
            self.config,
            self.bench.calibration,
            self._deadline,
        )

    def _plans(self, share: float) -> list[Plan]:
        """The best pipelines' plans.

        Args:
            share: Of the memory that may be filled.
        """
        fraction = share * self.config.memory_fraction
        self.bench = self.bench.like(replace(self.config, memory_fraction=fraction))
        late = time.perf_counter() > self._deadline
        self._before = self.kept[0] if self.kept and late else None
        self.kept = []
        found = self.search()
        # With all the memory the best may not fit: then time is better spent on a second search.
        only_best = share == 1.0 and time.perf_counter() > self._deadline
        return [
            self.build(c) for c in found[: most_played(self.graph, least=1 if only_best else 2)]
        ]

    def search(self) -> list[Candidate]:
        """The best pipelines, fastest first; once time is over, of what was tried until then.

        Integer programs of meshes with one axis are solved far faster than with two. Therefore the
        former are tried with all sizes of microbatches before the latter, which begin with the
        sizes that were best. A single size needs no such order, unless devices differ: every place
        has tables of its own then, so that there may be no time for two axes, nor for all sizes of
        microbatches, of which the most promising come first. Where a search with more memory took
        all the time, its best way to cut the batch comes first, and in smaller microbatches, which
        hold less: they may be the only ones.
        """
        by_size: dict[int, list[Split]] = {}
        for split in splits(self.graph, self.cluster, self.config):
            by_size.setdefault(split.local_batch, []).append(split)
        reached: dict[int, float] = {}
        if len(by_size) > 1 or not self.bench.alike:
            first = sorted(by_size) if self.bench.alike else self.bench.by_promise(by_size)
            if self._before is not None:
                best = self._before.split.local_batch
                first = sorted(first, key=lambda size: (size > best, size < best))
            reached = self._walk([(size, by_size[size]) for size in first], Wish(axes=1))
        if len(by_size) == 1 or self.bench.maker.most_axes > 1:
            order = sorted(by_size, key=lambda size: (reached.get(size, float("inf")), size))
            self._walk([(size, by_size[size]) for size in order], ANY)
        return self.kept

    def _walk(self, groups: Sequence[tuple[int, Sequence[Split]]], wish: Wish) -> dict[int, float]:
        """Tries sizes of microbatches one after the other.

        Returns:
            Size → seconds of the best of its pipelines that was kept.
        """
        worse = 0
        reached: dict[int, float] = {}
        for size, group in groups:
            before = self._limit()
            promising = self._promising([s for s in group if not self._too_late(s)])
            for _, split, sizes in sorted(promising, key=lambda p: self._turn(p[1], p[0])):
                if not self._too_late(split):
                    self._try(split, sizes, wish)
            own = [c.step_s for c in self.kept if c.split.local_batch == size]
            reached[size] = min(own, default=float("inf"))
            # Two sizes in a row without gain end the search: larger microbatches only pay up to a
            # point, and where the most promising come first, what follows promises less.
            worse = worse + 1 if self.kept and self._limit() >= before else 0
            if worse == 2:
                break
        return reached

    def _turn(self, split: Split, least_s: float) -> tuple[bool, float, int]:
        """What the splits of a size are tried in the order of: the most promising first.

        Where the model alone fills much of the memory, of splits that promise about the same that
        of the fewest replicas comes first: the others may leave no room.
        """
        led = self._led_before(split)
        if not self._tight:
            return not led, least_s, 0
        return not led, round(math.log(least_s, _ABOUT)), split.replicas

    def _over(self) -> bool:
        """Whether there is a pipeline, and no time to look for a better one."""
        return bool(self.kept) and time.perf_counter() > self._deadline

    def _too_late(self, split: Split) -> bool:
        return self._over() and not self._led_before(split)

    def _led_before(self, split: Split) -> bool:
        """Whether it was the best with more memory; or is that in smaller microbatches."""
        best = self._before and self._before.split
        return bool(
            best and split.replicas == best.replicas and split.local_batch <= best.local_batch
        )

    def _stays_inside(self) -> bool:
        """Whether the stages of the best pipeline, if there is one, stay inside nodes."""
        stages = [stage for best in self.kept[:1] for stage in best.pipeline.stages]
        return bool(stages) and all(s.devices <= self.bench.per_node for s in stages)

    def _limit(self) -> float:
        return self.kept[0].step_s if self.kept else float("inf")

    def _worst(self) -> float:
        """Seconds that a pipeline has to beat to be kept."""
        return self.kept[-1].step_s if len(self.kept) == _KEPT else float("inf")

    def _promising(self, group: Sequence[Split]) -> Iterator[tuple[float, Split, dict[int, float]]]:
        """(least seconds of any size, split, size → seconds that no pipeline goes below)."""
        tensor = self.config.tensor
        for split in group:
            if tensor == "auto":
                sizes = stage_sizes(split.devices, self.bench.per_node)
            else:
                sizes = [tensor] if tensor <= split.devices else []
            least = {size: self.bench.least_step_s(split, size, self.most_stages) for size in sizes}
            if least:
                yield min(least.values()), split, least

    def _try(self, split: Split, sizes: Mapping[int, float], wish: Wish) -> None:
        tables: dict[int, Places] = {}
        smallest, unit = min(sizes), math.gcd(*sizes)
        if min(sizes.values()) >= self._worst():
            return
        again = set()
        if self._before is not None and self._led_before(split):
            again = {stage.devices for stage in self._before.pipeline.stages}
        # The most promising come first: time may be over before all sizes have their tables.
        for size, least in sorted(
            sizes.items(), key=lambda item: (item[0] not in again, item[1], item[0])
        ):
            if size > self.bench.per_node and self._stays_inside():
                continue  # over nodes only where that was best before
            if least >= self._worst() and split.devices // smallest > MIXED_SLOTS:
                continue
            # What there has to be is solved however late it is; the rest is then only read.
            nothing = not (self.kept or tables)
            needed = nothing or (size in again and (wish.axes == 1 or not self.kept))
            until = math.inf if needed else self._deadline
            found = self.bench.tables(split, size, unit, replace(wish, until=until))
            if found:
                tables[size] = found
        if not tables:
            return
        for own, chosen in self._families(tables, split, unit):
            for pipeline in self._pipelines(chosen, split, own):
                if pipeline.stages and pipeline.step_s < self._worst():
                    self._keep(Candidate(split, pipeline))

    def _pipelines(self, tables: Tables, split: Split, unit: int) -> Iterable[Pipeline]:
        """Pipelines of stages of some sizes, that are worth a closer look.

        Args:
            tables: Devices of a stage → its tables.
            split: How the batch is cut.
            unit: Places are counted in so many devices.
        """
        most = min(self.most_stages, split.devices // min(tables), len(self.bench.units))
        yield best_pipeline(
            tables,
            split.devices,
            split.microbatches,
            unit=unit,
            most_stages=most,
            exactly=None if self.config.stages == "auto" else self.config.stages,
            limit_s=self._worst(),
        )

    def _families(
        self, tables: Tables, split: Split, unit: int
    ) -> list[tuple[int, dict[int, Places]]]:
        """Sizes that are tried together: each alone, and those that mix where that is affordable.

        Args:
            tables: Devices of a stage → its tables.
            split: How the batch is cut.
            unit: Their places are counted in so many devices.

        Returns:
            For every family what its places are counted in, the most that divides its sizes, and
            its tables.
        """
        sizes = sorted(tables)
        if split.devices // sizes[0] <= MIXED_SLOTS:
            families = [sizes]
        else:
            families = [[n] for n in tables]
            large = [n for n in sizes if split.devices // n <= MIXED_SLOTS]
            if len(large) > 1 and not self.bench.alike:
                families.append(large)
        found = []
        for family in families:
            own = math.gcd(*family)
            found.append((own, {n: tables[n][:: own // unit] for n in family}))
        return found

    def _keep(self, candidate: Candidate) -> None:
        found = candidate.split, candidate.step_s
        if found in [(c.split, c.step_s) for c in self.kept]:
            return  # the second walk meets what the first one found
        self.kept.append(candidate)
        self.kept.sort(key=lambda c: c.step_s)
        del self.kept[_KEPT:]

    def build(self, candidate: Candidate) -> Plan:
        """The plan that a candidate stands for."""
        schedule = "1f1b" if self.config.schedule == "auto" else self.config.schedule
        return self.bench.plan_of(
            candidate.split,
            candidate.pipeline.stages,
            schedule,
            planner=self.planner,
            predicted={"step_s": candidate.pipeline.step_s},
        )
