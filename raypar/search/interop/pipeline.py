"""The pipeline: which units make a stage, on how many devices, run in which way.

For a bound on the slowest stage, dynamic programming finds the stages with the least sum of stage
times; the step takes that sum plus (M - 1) times the slowest stage (Zheng et al. 2022, "Alpa",
section 5.1). The bounds that can win are few: from the least feasible one upwards until the bound
alone is worse than the best pipeline found. Memory follows 1F1B: a stage with s - 1 stages behind
it holds min(s, M) microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

_FINENESS = 2e-3
"""Relative distance to which the least feasible bound on the slowest stage is narrowed down."""
_ROUNDING = 1e-12
_LOOSER = (1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5)
"""Bounds above the least feasible one that are tried, as multiples of it."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """One way to run any unit on a mesh, with what every unit then costs.

    Attributes:
        key: Says what it is; opaque here.
        memory: Bytes that one device of the mesh may fill.
        seconds: Per unit, forward and backward of one microbatch, collectives included.
        once: Per unit, seconds once a step (gradient sync, optimizer).
        fixed: Per unit, bytes held through the step.
        saved: Per unit, bytes held per microbatch in flight.
        transient: Per unit, most bytes held for a moment.
        entry: Per unit, seconds that a microbatch needs to enter a stage that begins there, and its
            gradient to go back.
        held: Per unit, bytes that are kept per microbatch in flight where a stage begins there.
    """

    key: object
    memory: float
    seconds: Array
    once: Array
    fixed: Array
    saved: Array
    transient: Array
    entry: Array
    held: Array


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        first: Its first unit.
        last: One past its last unit.
        devices: Devices of one replica.
        place: The first of them, counted within a replica.
        way: How it runs.
        seconds: Of one microbatch, forward and backward.
    """

    first: int
    last: int
    devices: int
    place: int
    way: Way
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Stages in order.

    Attributes:
        stages: The stages.
        step_s: Predicted seconds of a step.
    """

    stages: tuple[Stage, ...] = field(default=())
    step_s: float = float("inf")


def in_flight(schedule: str, remaining: int, microbatches: int) -> int:
    """Microbatches that a stage holds at once, with so many stages to come (itself included)."""
    if schedule == "gpipe":
        return microbatches
    return min(2 * remaining - 1 if schedule == "eager_1f1b" else remaining, microbatches)


class WayTable:
    """Stage times for every first unit, last unit and number of stages to come.

    Args:
        ways: Ways to run on a mesh of one size.
        microbatches: M.
        schedule: Says how many microbatches a stage holds; see `in_flight`.
        most_held: It holds no more than so many, whatever comes after it; None: no such limit.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        microbatches: int,
        schedule: str = "1f1b",
        most_held: int | None = None,
    ) -> None:
        self.ways = list(ways)
        self.most_held = most_held
        self.microbatches = microbatches
        self.schedule = schedule
        self.n_units = len(ways[0].seconds)
        self._live = _not_beaten(self.ways, microbatches)
        live = [self.ways[i] for i in self._live]
        self._time = np.stack([_time(w, microbatches) for w in live])
        self._fixed = np.stack([_spans(w.fixed) + _most(w.transient) for w in live])
        self._saved = np.stack([_spans(w.saved) + w.held[:, None] for w in live])
        self._memory = np.array([w.memory for w in live])[:, None, None]
        self._tables: dict[int, tuple[Array, npt.NDArray[np.intp]]] = {}

    def least_bytes(self) -> float:
        """Least memory in which the whole model could run as one stage."""
        need = self._fixed + self._saved
        return float(need[:, 0, -1].min())

    @cached_property
    def _flights(self) -> tuple[Array, Array]:
        """(most microbatches in flight that fit, for every way and range; all such numbers)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            most = np.floor((self._memory - self._fixed) / self._saved * (1 + _ROUNDING))
        most[np.isnan(most)] = np.inf  # nothing is held for a microbatch
        most = np.where(self._fixed <= self._memory, most, -1.0)
        return most, np.unique(most)

    def at(self, remaining: int) -> tuple[Array, npt.NDArray[np.intp]]:
        """(time, way) of stages ``[i, j)`` that have `remaining` stages, themselves included.

        Time is infinite where no way fits the memory; once-a-step costs are spread over the
        microbatches, so that a stage that syncs for long is a slow one.
        """
        most, numbers = self._flights
        # Between two of the numbers, the same ways fit.
        held = in_flight(self.schedule, remaining, self.microbatches)
        if self.most_held is not None:
            held = min(held, self.most_held)
        key = int(np.searchsorted(numbers, held))
        if key not in self._tables:
            least = numbers[key] if key < len(numbers) else np.inf
            time = np.where(most >= least, self._time, np.inf)
            best = time.argmin(axis=0)
            found = np.take_along_axis(time, best[None], 0)[0]
            self._tables[key] = found, np.asarray(self._live)[best]
        return self._tables[key]


def _not_beaten(ways: Sequence[Way], microbatches: int) -> list[int]:
    """Positions of the ways that no other one beats at every unit, in time and in memory."""
    rows = np.stack(
        [
            np.concatenate(
                [
                    w.seconds + w.once / microbatches, w.entry, w.fixed, w.saved, w.transient,
                    w.held, [-w.memory],
                ]
            )
            for w in ways
        ]
    )  # fmt: skip
    kept: list[int] = []
    for i, row in enumerate(rows):
        if any((rows[k] <= row).all() for k in kept):
            continue
        kept = [k for k in kept if not (row <= rows[k]).all()] + [i]
    return kept


def _time(way: Way, microbatches: int) -> Array:
    """Seconds of a microbatch in every stage ``[i, j)``.

    What enters and what goes back have ports of their own and are under way while other
    microbatches are computed: only what takes longer than the computing counts every time, and the
    way of the first microbatch once. Once-a-step costs are spread over the microbatches.
    """
    busy = _spans(way.seconds + way.once / microbatches)
    return np.maximum(busy, way.entry[:, None] / 2) + way.entry[:, None] / microbatches


def _spans(values: Array) -> Array:
    """Sum over every ``[i, j)``; infinite where j <= i."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    spans = total[None, 1:] - total[:-1, None]
    n = len(values)
    return np.where(np.arange(n)[None, :] >= np.arange(n)[:, None], spans, np.inf)


def _most(values: Array) -> Array:
    """Maximum over every ``[i, j)``."""
    n = len(values)
    result = np.zeros((n, n))
    for i in range(n):
        result[i, i:] = np.maximum.accumulate(values[i:])
    return result


Places = Sequence[WayTable | None]
"""For every place its table, or a single one where all places are alike; None where no stage may
begin. The first place, a multiple of every size, has one."""
Tables = Mapping[int, Places]


def tables_of(places: Places) -> list[WayTable]:
    """The tables of places, each once."""
    return list({id(table): table for table in places if table is not None}.values())


def table_at(places: Places, index: int) -> WayTable | None:
    """The table of a place."""
    return places[index] if len(places) > 1 else places[0]


def best_pipeline(
    tables: Tables,
    devices: int,
    microbatches: int,
    *,
    unit: int,
    most_stages: int,
    exactly: int | None = None,
    limit_s: float = float("inf"),
) -> Pipeline:
    """The fastest pipeline.

    Args:
        tables: Devices of a stage (of one replica) → its tables.
        devices: Devices of one replica; some may stay idle.
        microbatches: M.
        unit: Places are counted in so many devices, which divide every size.
        most_stages: Largest number of stages.
        exactly: The number of stages, where it is given.
        limit_s: Pipelines that take longer are of no interest.

    Returns:
        The best one; without stages where none fits the memory or beats the limit.
    """
    best = Pipeline(step_s=limit_s)
    least_sum = 0.0

    def consider(bound: float) -> float | None:
        """Slowest stage of the least sum under a bound; None where there is none."""
        nonlocal best, least_sum
        found = _least_sum(tables, devices, unit, bound, most_stages, exactly)
        if found is None:
            return None
        slowest = max(s.seconds for s in found)
        total = sum(s.seconds for s in found)
        least_sum = least_sum or total  # the first bound is none
        step = total + (microbatches - 1) * slowest
        if step < best.step_s:
            best = Pipeline(tuple(found), step)
        return slowest

    high = consider(float("inf"))
    if high is None or microbatches == 1:
        return best
    # Nothing has a smaller sum than what was found, and no bound is below an equal share of it.
    low = least_sum / min(most_stages, devices // min(tables))
    if least_sum + (microbatches - 1) * low >= best.step_s:
        return best
    while high > low * (1 + _FINENESS):
        if least_sum + (microbatches - 1) * low >= best.step_s:
            return best
        middle = math.sqrt(low * high) if low else high / 2
        slowest = consider(middle)
        if slowest is None:
            low = middle
        else:
            high = slowest
        if high - low < 1e-12:
            break
    for factor in _LOOSER:
        if least_sum + (microbatches - 1) * high >= best.step_s:
            break
        consider(high * factor)
    return best


def _least_sum(
    tables: Tables, devices: int, unit: int, bound: float, most_stages: int, exactly: int | None
) -> list[Stage] | None:
    """Stages with the least sum of times, none slower than `bound`."""
    assert not any(size % unit for size in tables)
    smallest = min(tables)
    first = tables_of(tables[smallest])[0]
    n = first.n_units
    slots = devices // unit
    most = min(most_stages, n, devices // smallest)
    if len(tables) == 1 and len(tables[smallest]) == 1:
        return _one_size(smallest, first, most, bound, exactly)
    # least[d][i]: least time of units i... in s stages on the last d slots; built up over s.
    least = np.tile(_only_end(n), (slots + 1, 1))
    picks: list[npt.NDArray[np.int32]] = []
    answer: tuple[float, int] = (np.inf, 0)
    units = np.arange(n)
    for s in range(1, most + 1):
        after = np.full((slots + 1, n + 1), np.inf)
        pick = np.zeros((2, slots + 1, n + 1), dtype=np.int32)  # the first stage's end, its size
        ends, widths = pick
        possible: npt.NDArray[np.bool_] = np.isfinite(least[:, 1:]).max(axis=1)
        times: dict[int, Array] = {}
        for d in range(1, slots + 1):
            for size, places in tables.items():
                width = size // unit
                if width > d or not possible[d - width]:
                    continue
                table = table_at(places, slots - d)
                if table is None:
                    continue
                if id(table) not in times:
                    time, _ = table.at(s)
                    times[id(table)] = np.where(time <= bound, time, np.inf)
                total = times[id(table)] + least[d - width][None, 1:]
                end = total.argmin(axis=1)
                value = total[units, end]
                better = value < after[d, :n]
                np.copyto(after[d, :n], value, where=better)
                np.copyto(ends[d, :n], end + 1, where=better, casting="unsafe")
                np.copyto(widths[d, :n], size, where=better)
            idle = after[d - 1] < after[d]  # the first of these slots stays idle: size 0
            np.copyto(after[d], after[d - 1], where=idle)
            np.copyto(ends[d], np.arange(n + 1), where=idle, casting="unsafe")
            np.copyto(widths[d], 0, where=idle)
        picks.append(pick)
        least = after
        if after[slots, 0] < answer[0] and exactly in (None, s):
            answer = (float(after[slots, 0]), s)
    return None if not np.isfinite(answer[0]) else _unroll(tables, unit, picks, slots, answer[1])


def _only_end(n: int) -> Array:
    row = np.full(n + 1, np.inf)
    row[n] = 0.0
    return row


def _unroll(
    tables: Tables, unit: int, picks: Sequence[npt.NDArray[np.int32]], slots: int, stages: int
) -> list[Stage]:
    found, at, left = [], 0, slots
    while stages:
        end, size = (int(v) for v in picks[stages - 1][:, left, at])
        if size:
            table = table_at(tables[size], slots - left)
            assert table is not None
            found.append(_stage(table, at, end, size, stages, (slots - left) * unit))
            stages -= 1
        at, left = end, left - max(size // unit, 1)
    return found


def _one_size(
    size: int, table: WayTable, most: int, bound: float, exactly: int | None
) -> list[Stage] | None:
    """All stages on meshes of one size: the devices follow from the number of stages."""
    n = table.n_units
    rest = _only_end(n)
    ends: list[npt.NDArray[np.intp]] = []
    answer = (np.inf, 0)
    for s in range(1, most + 1):
        time, _ = table.at(s)
        total = np.where(time <= bound, time, np.inf) + rest[None, 1:]
        end = total.argmin(axis=1)
        rest = np.append(total[np.arange(n), end], np.inf)
        ends.append(end + 1)
        if rest[0] < answer[0] and exactly in (None, s):
            answer = (float(rest[0]), s)
    if not np.isfinite(answer[0]):
        return None
    found: list[Stage] = []
    at = 0
    for s in range(answer[1], 0, -1):
        end = int(ends[s - 1][at])
        found.append(_stage(table, at, end, size, s, len(found) * size))
        at = end
    return found


def _stage(table: WayTable, first: int, last: int, size: int, remaining: int, place: int) -> Stage:
    time, way = table.at(remaining)
    chosen = table.ways[way[first, last - 1]]
    return Stage(first, last, size, place, chosen, float(time[first, last - 1]))
