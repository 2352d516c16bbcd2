"""From outer decisions to a plan: the exact solvers fill in what is left open.

Cuts come from dynamic programming over the stages (`raypar.search.interop.pipeline`), shardings
from the intra-op program, policies from the choice of the fastest way that fits. Tables are kept
between trials.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from raypar.errors import PlanError
from raypar.plan import Plan
from raypar.schedules.interleaved_1f1b import warm_up
from raypar.schedules.interleaved_zero_bubble import InterleavedZeroBubble
from raypar.schedules.registry import get_schedule
from raypar.search.interop.pipeline import (
    Pipeline,
    Places,
    Stage,
    Way,
    WayTable,
    best_pipeline,
    table_at,
    tables_of,
)
from raypar.search.interop.space import MIXED_SLOTS, Split, stage_sizes
from raypar.search.interop.ways import WayKey, Wish
from raypar.search.interop.workbench import MOST_STAGES, Workbench
from raypar.search.study.space import MIXED, SOLVER, Decisions, Space

_MOST_TABLES = 256
RAMP = dict.fromkeys(("zero_bubble_h1", "interleaved_zero_bubble", "interleaved_eager"), 1 / 3)
"""Share of 1F1B's fill and drain that other schedules have."""


class InfeasibleError(Exception):
    """These decisions lead to no plan.

    Attributes:
        overfull: How many times over the least plan of this kind fills the memory; 0 where memory
            is not the reason.
    """

    def __init__(self, reason: str, overfull: float = 0.0) -> None:
        super().__init__(reason)
        self.overfull = overfull


@dataclass(frozen=True)
class Draft:
    """A plan in the solvers' figures.

    Attributes:
        split: How the batch is cut.
        stages: The stages in order.
        placement: For every stage its (rank group, chunk).
        schedule: Name of the schedule.
        line: Devices in the order in which stages take them.
        step_s: Seconds of a step by the solvers' own figures.
    """

    split: Split
    stages: tuple[Stage, ...]
    placement: tuple[tuple[int, int], ...]
    schedule: str
    line: tuple[int, ...]
    step_s: float

    def plan(self, bench: Workbench) -> Plan:
        """The plan itself."""
        return bench.plan_of(
            self.split,
            self.stages,
            self.schedule,
            planner="optuna",
            placement=self.placement,
            line=self.line,
            predicted={"step_s": self.step_s},
        )


class Drafter:
    """Carries decisions out.

    Args:
        space: What is decided on.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.bench = space.bench
        self._tables: OrderedDict[object, Places] = OrderedDict()

    def draft(self, decisions: Decisions, share: float = 1.0, *, axes: int | None = None) -> Draft:
        """The best plan of these decisions, by the solvers' figures.

        Args:
            decisions: What was proposed.
            share: Of the memory that may be filled, what the solvers may count on.
            axes: Most axes of a stage's mesh; fewer are solved faster. None: any number.

        Raises:
            InfeasibleError: There is none.
        """
        split = self.space.split_of(decisions)
        if split.devices < 1:
            raise InfeasibleError(
                f"{decisions.replicas} replicas need more than {decisions.used} devices"
            )
        line = tuple(self.bench.line[: decisions.used or None])
        if decisions.turned:
            line = line[::-1]
        wish = Wish(
            None if decisions.modes == SOLVER else decisions.modes,
            decisions.forms,
            "auto" if decisions.recompute == SOLVER else decisions.recompute,
            "auto" if isinstance(decisions.zero, str) else decisions.zero,
            axes,
        )
        question = _Question(self, decisions, split, wish, line, share)
        stages, groups = question.interleaved() if decisions.chunks > 1 else question.plain()
        if decisions.moves:
            stages = question.moved(stages)
        if decisions.policies:
            stages = question.with_policies(stages)
        placement = tuple((s % groups, s // groups) for s in range(len(stages)))
        step_s = _step_s(stages, groups, split.microbatches, decisions.schedule)
        return Draft(split, tuple(stages), placement, decisions.schedule, line, step_s)

    def tables(
        self,
        split: Split,
        size: int,
        unit: int,
        wish: Wish,
        line: tuple[int, ...],
        schedule: str,
        share: float,
    ) -> Places:
        """See `Workbench.tables`; the last ones are kept."""
        key = (split, size, unit, wish, line if not self.bench.alike else None, schedule, share)
        if key not in self._tables:
            try:
                found = self.bench.tables(split, size, unit, wish, line, schedule)
                self._tables[key] = found if share == 1.0 else _smaller(found, share)
            except PlanError as error:  # forms that do not go together
                raise InfeasibleError(str(error)) from None
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


@dataclass
class _Question:
    """One set of decisions on its way to stages."""

    drafter: Drafter
    decisions: Decisions
    split: Split
    wish: Wish
    line: tuple[int, ...]
    share: float

    def sizes(self) -> list[int]:
        """Devices that a stage may have."""
        if self.decisions.devices != MIXED:
            return [min(self.decisions.devices, self.split.devices)]
        per_node = self.drafter.bench.per_node
        sizes = stage_sizes(self.split.devices, per_node)
        inside = [n for n in sizes if n <= per_node]
        return [n for n in inside if self.split.devices // n <= MIXED_SLOTS] or inside[-1:]

    def _tables(self, size: int, unit: int, wish: Wish) -> Places:
        schedule = self.decisions.schedule
        return self.drafter.tables(self.split, size, unit, wish, self.line, schedule, self.share)

    def plain(self) -> tuple[list[Stage], int]:
        """One stage per rank group."""
        sizes = self.sizes()
        unit = math.gcd(*sizes)
        tables: dict[int, Places] = {}
        for size in sizes:
            table = self._tables(size, unit, self.wish)
            if table:
                tables[size] = table
        if not tables:
            raise InfeasibleError("no way to run a stage on such devices")
        groups = self.decisions.groups
        found = best_pipeline(
            tables,
            self.split.devices,
            self.split.microbatches,
            unit=unit,
            most_stages=groups or MOST_STAGES,
            exactly=groups or None,
        )
        self._need(found, tables.values())
        return list(found.stages), len(found.stages)

    def interleaved(self) -> tuple[list[Stage], int]:
        """Several stages per rank group, all groups on meshes of one shape.

        Stages are balanced as if each had devices of its own with its share of the memory.
        """
        size, chunks = self.sizes()[-1], self.decisions.chunks
        room = self.split.devices // size
        units = len(self.drafter.bench.units)
        groups = min(self.decisions.groups or room, room, max(units // chunks, 1))
        if groups < 2:
            raise InfeasibleError("interleaving needs two rank groups at least")
        tables = self._tables(size, size, self.wish)
        if not tables:
            raise InfeasibleError("no way to run a stage on such devices")
        best = Pipeline()
        # On meshes of one size, places that are counted in it are all open.
        shared = [
            _by_shape(table, groups, chunks, self.split.microbatches)
            for table in tables
            if table is not None
        ]
        for shape in shared[0]:
            if not all(shape in table for table in shared):
                continue
            places = [table[shape] for table in shared]
            many = groups * chunks
            row = places if len(places) == 1 else [places[s % groups] for s in range(many)]
            found = best_pipeline(
                {size: row},
                groups * chunks * size,
                self.split.microbatches * chunks,
                unit=size,
                most_stages=groups * chunks,
                exactly=groups * chunks,
            )
            if found.step_s < best.step_s:
                best = found
        self._need(best, [tables])
        return [
            replace(stage, place=(s % groups) * size) for s, stage in enumerate(best.stages)
        ], groups

    def moved(self, stages: Sequence[Stage]) -> list[Stage]:
        """With cuts where the proposal wants them."""
        cuts = [stage.first for stage in stages[1:]]
        wanted = [c + m for c, m in zip(cuts, self.decisions.moves, strict=False)]
        wanted += cuts[len(wanted) :]
        n = len(self.drafter.bench.units)
        bounds = [0, *wanted, n]
        for i in range(1, len(bounds) - 1):  # every stage keeps a unit
            bounds[i] = min(max(bounds[i], bounds[i - 1] + 1), n - (len(bounds) - 1 - i))
        return self._again(
            [replace(s, first=bounds[i], last=bounds[i + 1]) for i, s in enumerate(stages)]
        )

    def with_policies(self, stages: Sequence[Stage]) -> list[Stage]:
        """With the proposal's policy for every stage."""
        wishes = []
        for recompute, zero in self.decisions.policies:
            wish = self.wish
            if recompute != SOLVER:
                wish = replace(wish, recompute=recompute)
            if not isinstance(zero, str):
                wish = replace(wish, zero=zero)
            wishes.append(wish)
        return self._again(stages, wishes)

    def _again(self, stages: Sequence[Stage], wishes: Sequence[Wish] = ()) -> list[Stage]:
        """The fastest way of every stage that fits, with the stages as they are."""
        chunks = self.decisions.chunks
        found = []
        for i, stage in enumerate(stages):
            wish = wishes[i] if i < len(wishes) else self.wish
            # Where a stage may begin is the same, whatever places are counted in.
            unit = math.gcd(stage.devices, stage.place)
            tables = self._tables(stage.devices, unit, wish)
            table = table_at(tables, stage.place // unit) if tables else None
            if table is None:
                raise InfeasibleError("no way to run a stage on such devices")
            if chunks > 1:
                assert isinstance(stage.way.key, WayKey)
                groups = len(stages) // chunks
                shaped = _by_shape(table, groups, chunks, self.split.microbatches)
                table = shaped[stage.way.key.shape]
            seconds, way = table.at(len(stages) - i)
            took = float(seconds[stage.first, stage.last - 1])
            if took == float("inf"):
                raise InfeasibleError(f"stage {i} does not fit the memory with these policies", 1.1)
            chosen = table.ways[int(way[stage.first, stage.last - 1])]
            found.append(replace(stage, way=chosen, seconds=took))
        return found

    def _need(self, found: Pipeline, tables: Iterable[Places]) -> None:
        """Tells why there are no stages."""
        if found.stages:
            return
        slots = self.split.devices / min(self.sizes())
        table = tables_of(next(iter(tables)))[0]
        over = table.least_bytes() / (slots * max(way.memory for way in table.ways))
        if over > 1.0:
            words = f"needs {over:.2f} times the memory that these devices have"
            raise InfeasibleError(words, over)
        raise InfeasibleError("no stages with these decisions fit the memory", 1.05)


def _smaller(places: Places, share: float) -> Places:
    """The same tables for devices with less memory."""
    made: dict[int, WayTable] = {}
    for table in tables_of(places):
        ways = [replace(way, memory=way.memory * share) for way in table.ways]
        made[id(table)] = WayTable(ways, table.microbatches, table.schedule, table.most_held)
    return [None if table is None else made[id(table)] for table in places]


def held_per_chunk(schedule: str, groups: int, chunks: int, microbatches: int) -> int:
    """Microbatches that a chunk holds, on average over those of the group that holds most.

    That is the first group: one turn through a chunk for each of its warm-up, and the next one.
    """
    found = get_schedule(schedule)
    size = groups
    if isinstance(found, InterleavedZeroBubble):
        size = found.round_size(groups, microbatches)
    turns = min(warm_up(0, groups, chunks, size) + 1, chunks * microbatches)
    return -(-turns // chunks)


def _by_shape(
    table: WayTable, groups: int, chunks: int, microbatches: int
) -> dict[tuple[int, ...], WayTable]:
    """Tables of ways on one mesh shape each, with a chunk's share of the memory.

    What an op needs while it runs is needed once, since one chunk runs at a time.
    """
    held = held_per_chunk(table.schedule, groups, chunks, microbatches)
    found: dict[tuple[int, ...], list[Way]] = {}
    for way in table.ways:
        assert isinstance(way.key, WayKey)
        share = replace(way, memory=way.memory / chunks, transient=way.transient / chunks)
        found.setdefault(way.key.shape, []).append(share)
    return {s: WayTable(ways, microbatches, table.schedule, held) for s, ways in found.items()}


def _step_s(stages: Sequence[Stage], groups: int, microbatches: int, schedule: str) -> float:
    """Seconds of a step: the slowest rank group all along, and the pipeline filling and draining.

    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2: chunks divide the ramp.
    """
    busy = [sum(s.seconds for s in stages[g::groups]) for g in range(groups)]
    slowest = max(busy)
    chunks = len(stages) / groups
    ramp = (sum(busy) - slowest) / chunks * RAMP.get(schedule, 1.0)
    return microbatches * slowest + ramp
