"""What a store of measurements keeps: stages, collectives and steps, as rows with a JSON form."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from raypar.search.cost.features import StageWork
from raypar.search.cost.work import Work

ALONE, TOGETHER = "alone", "together"
"""Where a stage was measured: by itself on one device, or inside a step, its neighbours at work."""


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _merged(
    values: tuple[float, ...], others: tuple[float, ...], share: float
) -> tuple[float, ...]:
    """Geometric means; 0 stands for what was not measured."""
    return tuple(
        math.exp((1.0 - share) * math.log(a) + share * math.log(b)) if a and b else a or b
        for a, b in zip(values, others, strict=True)
    )


@dataclass(frozen=True, slots=True)
class StageRow:
    """A measured stage.

    Attributes:
        work: What the stage does.
        device: Kind of its device.
        seconds: Measured forward, backward, backward's two halves, and the optimizer's step; 0
            where it was not measured.
        where: ``alone`` or ``together``.
        ranks: Ranks at work on its machine at the same time.
        origin: Stages with the same one come from one model.
        count: Measurements in it.
        at: When, in seconds since 1970.
        working_bytes: Most bytes that one microbatch was seen to hold besides what it was given;
            0 where that is not known.
        counted_bytes: The same by the analytic model.
    """

    kind: ClassVar[str] = "stage"
    work: StageWork
    device: str
    seconds: tuple[float, ...]
    where: str = ALONE
    ranks: int = 1
    origin: str = ""
    count: int = 1
    at: float = 0.0
    working_bytes: int = 0
    counted_bytes: int = 0

    @property
    def key(self) -> str:
        """Equal for measurements of the same thing."""
        return _digest(self.kind, self.work.digest, self.device, self.where, self.ranks)

    def merged(self, newer: StageRow) -> StageRow:
        """This row and a newer one of the same thing."""
        share = newer.count / (self.count + newer.count)
        return dataclasses.replace(
            newer,
            seconds=_merged(self.seconds, newer.seconds, share),
            count=self.count + newer.count,
            working_bytes=newer.working_bytes or self.working_bytes,
            counted_bytes=newer.counted_bytes or self.counted_bytes,
        )


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """A measured collective.

    Attributes:
        collective: One of `raypar.sharding.convert.COLLECTIVES`, or ``p2p``.
        tier: ``inside`` a node or ``across`` nodes.
        size: Ranks that took part.
        nbytes: Bytes of the larger side on one rank.
        seconds: Measured.
        count: Measurements in it.
        at: When, in seconds since 1970.
    """

    kind: ClassVar[str] = "collective"
    collective: str
    tier: str
    size: int
    nbytes: float
    seconds: float
    count: int = 1
    at: float = 0.0

    @property
    def key(self) -> str:
        """Equal for measurements of nearly the same: sizes within 5 %."""
        rough = round(20 * math.log(max(self.nbytes, 1.0)))
        return _digest(self.kind, self.collective, self.tier, self.size, rough)

    def merged(self, newer: CollectiveRow) -> CollectiveRow:
        """This row and a newer one of the same thing."""
        share = newer.count / (self.count + newer.count)
        (seconds,) = _merged((self.seconds,), (newer.seconds,), share)
        return dataclasses.replace(newer, seconds=seconds, count=self.count + newer.count)


@dataclass(frozen=True, slots=True)
class StepRow:
    """A measured step of a plan.

    Attributes:
        features: What `raypar.search.cost.step_correction.step_features` says of the plan.
        simulated_s: Seconds of the simulated step.
        measured_s: Seconds of the real one.
        simulated_bytes: Most bytes that a rank would hold; 0 where that is not known.
        measured_bytes: Most that one held; 0 where that is not known.
        plan: Equal for steps of one plan.
        origin: Plans of one model have the same one.
        count: Measurements in it.
        at: When, in seconds since 1970.
    """

    kind: ClassVar[str] = "step"
    features: dict[str, float]
    simulated_s: float
    measured_s: float
    simulated_bytes: int = 0
    measured_bytes: int = 0
    plan: str = ""
    origin: str = ""
    count: int = 1
    at: float = 0.0

    @property
    def key(self) -> str:
        """Equal for measurements of the same thing."""
        return _digest(self.kind, self.plan, self.origin, sorted(self.features.items()))

    def merged(self, newer: StepRow) -> StepRow:
        """This row and a newer one of the same thing."""
        share = newer.count / (self.count + newer.count)
        (measured,) = _merged((self.measured_s,), (newer.measured_s,), share)
        return dataclasses.replace(newer, measured_s=measured, count=self.count + newer.count)


StoreRow = StageRow | CollectiveRow | StepRow
_KINDS: Mapping[str, type[StageRow] | type[CollectiveRow] | type[StepRow]] = {
    row.kind: row for row in (StageRow, CollectiveRow, StepRow)
}


def row_to_json(row: StoreRow) -> str:
    """One line of JSON; `row_from_json` gives back an equal row.

    Raises:
        ValueError: A figure is not finite, or not positive where it has to be.
    """
    raw = dataclasses.asdict(row)
    if isinstance(row, StageRow):
        raw["work"]["works"] = [[*work, *counts] for work, counts in row.work.works]
        if not row.working_bytes:  # as every row was written before bytes were measured
            del raw["working_bytes"], raw["counted_bytes"]
    _check(row)
    return json.dumps({"kind": row.kind, **raw}, separators=(",", ":"), allow_nan=False)


def row_from_json(text: str) -> StoreRow:
    """Reads what `row_to_json` wrote.

    Raises:
        ValueError: It is no such row.
    """
    try:
        raw: dict[str, Any] = json.loads(text)
        make = _KINDS[raw.pop("kind")]
        if make is StageRow:
            raw["work"] = _work(raw["work"])
            raw["seconds"] = tuple(float(s) for s in raw["seconds"])
        row: StoreRow = make(**raw)
        _check(row)
        return row
    except (
        KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"no row of measurements: {error!r}") from None


def _work(raw: dict[str, Any]) -> StageWork:
    works = []
    for flops, nbytes, dtype, matmul, kind, padded, calls, *counts in raw["works"]:
        work = Work(
            float(flops), float(nbytes), str(dtype), bool(matmul), str(kind), float(padded),
            float(calls),
        )  # fmt: skip
        forward, backward, first, second = map(int, counts)
        works.append((work, (forward, backward, first, second)))
    return StageWork(
        tuple(works),
        int(raw["optimized_bytes"]),
        int(raw["optimized"]),
        str(raw["recompute"]),
        tuple((str(name), int(size)) for name, size in raw["axes"]),
    )


def _check(row: StoreRow) -> None:
    if isinstance(row, StageRow):
        times: tuple[float, ...] = row.seconds
        sizes = [v for work, counts in row.work.works for v in (*work[:2], *work[5:], *counts)]
        sizes += [row.working_bytes, row.counted_bytes]
        good = len(times) == 5 and row.where in (ALONE, TOGETHER) and row.ranks >= 1
    elif isinstance(row, CollectiveRow):
        times, sizes, good = (row.seconds,), [row.nbytes], row.size >= 2 and row.seconds > 0
    else:
        times, sizes = (row.simulated_s, row.measured_s), list(row.features.values())
        good = min(times) > 0 and all(isinstance(name, str) for name in row.features)
    finite = all(math.isfinite(v) for v in (*times, *sizes, row.at))
    if not (good and finite and min(times) >= 0 and max(times) > 0 and row.count >= 1):
        raise ValueError(f"a {row.kind} row with figures that cannot be: {times}")
