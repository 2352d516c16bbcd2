"""What the learned cost model looks at: the ops of a stage's programs, and how they share its time.

A stage is kept as a table of its different ops (`raypar.search.cost.work.Work`) with how often each
of its four programs runs them. Nothing in it depends on a calibration: what was measured long ago
can be priced with the constants of today. Priced on a machine, the table gives the analytic seconds
of every class of op, by size: the columns that `raypar.search.cost.regression` corrects.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from raypar.search.cost.analytic import cached_pieces
from raypar.search.cost.base import StageCode
from raypar.search.cost.exact import move_of
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import additions, param_cost
from raypar.search.cost.work import Work, node_work

PIECES = ("forward", "backward", "backward_input", "backward_weight")
"""The programs of a stage, in the order of all tuples here."""
OPTIMIZER = "optimizer"
"""What the optimizer's step is called where a piece is named; it comes after `PIECES`."""
_EXCHANGE = "exchange"
"""Class of the collectives inside a program: what they take of the device itself."""
EXTRA = "extra"
"""Family of columns that the analytic model knows nothing of: it says 0 seconds."""

Counts = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one device does for a stage, without how long it takes.

    Attributes:
        works: Different ops, with how often each program of `PIECES` runs them.
        optimized_bytes: Bytes of parameters that the optimizer steps over.
        optimized: Tensors that they are.
        recompute: The stage's policy.
        axes: (name, size) of its mesh.
    """

    works: tuple[tuple[Work, Counts], ...]
    optimized_bytes: int = 0
    optimized: int = 0
    recompute: str = "none"
    axes: tuple[tuple[str, int], ...] = ()

    @property
    def digest(self) -> str:
        """Equal for stages that do the same."""
        text = json.dumps([self.works, self.optimized_bytes, self.optimized, self.recompute])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def op_classes(self) -> str:
        """A short name for the mix of op classes: models of one family have few of them."""
        kinds = sorted({f"{w.kind}{w.matmul:d}" for w, _ in self.works})
        return hashlib.sha256(" ".join(kinds).encode()).hexdigest()[:8]


def stage_work(stage: StageCode) -> StageWork:
    """The table of a stage's ops; its programs are traced as its rank would (cached)."""
    pieces = cached_pieces(stage)
    params = param_cost(stage)
    parts = pieces.parts
    programs: list[Iterable[fx.Node]] = [pieces.forward.nodes, (), (), ()]
    if parts is not None:
        whole = parts.backward.nodes
        halves = (
            (parts.backward_input.nodes, parts.backward_weight.nodes)
            if pieces.splits
            else (whole, ())
        )
        programs = [pieces.forward.nodes, whole, *halves]
    counts: dict[Work, Counter[int]] = {}
    for at, nodes in enumerate(programs):
        for node in nodes:
            move = move_of(node)
            work = (
                node_work(node) if move is None else Work(0.0, float(move.nbytes), kind=_EXCHANGE)
            )
            counts.setdefault(work, Counter())[at] += 1
    if parts is not None:
        last = 3 if pieces.splits else 2
        for adding, count in additions(params, pieces.products).items():
            counts.setdefault(adding, Counter()).update({1: count, last: count})
    table = [(work, (c[0], c[1], c[2], c[3])) for work, c in counts.items() if work.kind != "none"]
    return StageWork(
        tuple(sorted(table)),
        params.optimized_bytes,
        params.optimized,
        stage.recompute,
        stage.axes,
    )


class Column(NamedTuple):
    """One thing whose speed is learned.

    Attributes:
        device: Device kind.
        family: ``product``, ``memory``, ``call`` or ``extra``: classes of a family are corrected
            alike where little is known.
        kind: Class of op.
        size: Position on the scale of sizes (`KNOTS`), -1 where sizes do not count.
        density: Position on the scale of FLOPs per byte (`DENSITIES`) for products, else -1.
    """

    device: str
    family: str
    kind: str
    size: int = -1
    density: int = -1


KNOTS = (4.0, 5.0, 6.0, 7.0, 8.0)
"""Decimal logarithms of the bytes of one op (for products: of a hundredth of their FLOPs) between
which speeds are interpolated: from what fits into a first cache to what fits into none."""

DENSITIES = (0.5, 1.0, 1.5, 2.0)
"""The same for FLOPs per byte of products: few of them wait for memory, however large."""

_EXCHANGE_CALLS = 10.0

Seconds = dict[Column, float]


def analytic_s(seconds: Mapping[Column, float]) -> float:
    """What the analytic model says."""
    return sum(s for column, s in seconds.items() if column.family != EXTRA)


def _spread(value: float, knots: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """Weights of the knots around the logarithm of a value; they add up to 1."""
    at = (math.log10(max(value, 1e-3)) - knots[0]) / (knots[1] - knots[0])
    at = min(max(at, 0.0), len(knots) - 1.0)
    low = min(int(at), len(knots) - 2)
    share = at - low
    return tuple((k, w) for k, w in ((low, 1.0 - share), (low + 1, share)) if w > 0.0)


def _columns_of(work: Work, machine: MeshMachine) -> Seconds:
    """Analytic seconds of one op by column."""
    device = machine.kinds[0][0].name
    if work.kind == _EXCHANGE:
        # Calling it, and laying out what it brings: about what so many small ops and a copy take.
        rest = machine.compute_s(0.0, work.nbytes, work.dtype, False, "copy") - machine.overhead_s
        return {
            Column(device, EXTRA, "calls"): _EXCHANGE_CALLS * machine.overhead_s,
            Column(device, EXTRA, "bytes"): max(rest, 0.0),
        }
    whole = work.seconds(machine)
    if work.kind == "view":
        return {Column(device, "call", "view"): whole}
    calls = min(work.calls * machine.overhead_s, whole)
    kind = work.kind or ("product" if work.matmul else "plain")
    found = {Column(device, "call", kind): calls}
    family = "memory"
    densities: tuple[tuple[int, float], ...] = ((-1, 1.0),)
    size = work.nbytes
    if work.matmul:
        family, size = "product", work.flops / 100.0
        densities = _spread(work.flops / max(work.nbytes, 1.0), DENSITIES)
    for knot, share in _spread(size, KNOTS):
        for density, part in densities:
            found[Column(device, family, kind, knot, density)] = share * part * (whole - calls)
    return found


class PricedStage(NamedTuple):
    """A stage's table, priced.

    Attributes:
        pieces: Per program of `PIECES`, then the optimizer, analytic seconds by column.
        traits: What else may slow the stage down or speed it up, per piece: see `TRAITS`.
    """

    pieces: tuple[Seconds, ...]
    traits: tuple[tuple[float, ...], ...]


TRAITS = (
    "seconds",
    "calls",
    "products",
    "footprint",
    "backward",
    "recompute",
    "sharded",
    "together",
)
"""Traits of a piece: log10 of its analytic seconds; share of its time in calls, and in products;
log10 of the bytes that it touches; whether it is a backward, how much is recomputed, log2 of the
devices over which its ops are sharded; log2 of the ranks at work beside it, 0 where it is alone."""

_RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}


class Pricer:
    """Prices tables on one machine; equal ops are priced once."""

    def __init__(self, machine: MeshMachine) -> None:
        self._machine = machine
        self._known: dict[Work, Seconds] = {}

    def __call__(self, work: StageWork, ranks: int) -> PricedStage:
        """A table with its analytic seconds.

        Args:
            work: The table.
            ranks: Ranks that are at work on its machine at the same time; 1: it is alone.
        """
        pieces: list[Seconds] = [{} for _ in PIECES]
        footprint = [1.0] * len(PIECES)
        traffic = [0.0] * len(PIECES)
        for one, counts in work.works:
            columns = self._known.get(one)
            if columns is None:
                columns = self._known[one] = _columns_of(one, self._machine)
            for at, count in enumerate(counts):
                if count:
                    footprint[at] += count * one.nbytes
                    traffic[at] += count * one.nbytes if one.matmul else 0.0
                    own = pieces[at]
                    for column, seconds in columns.items():
                        own[column] = own.get(column, 0.0) + count * seconds
        for at, nbytes in enumerate(traffic):
            pieces[at].update(self._traffic(nbytes, footprint[at]))
        pieces.append(self._optimizer(work))
        footprint.append(1.0 + work.optimized_bytes)
        together = math.log2(max(ranks, 1))
        traits = tuple(
            _traits(at, seconds, footprint[at], work, together) for at, seconds in enumerate(pieces)
        )
        return PricedStage(tuple(pieces), traits)

    def _traffic(self, nbytes: float, footprint: float) -> Seconds:
        """What products wait for memory besides, where a program touches more than caches hold.

        The analytic model has products and their traffic overlap fully.
        """
        if not nbytes:
            return {}
        device = self._machine.kinds[0][0].name
        whole = self._machine.compute_s(0.0, nbytes, matmul=False, kind="plain")
        return {
            Column(device, EXTRA, "traffic", knot): share * whole
            for knot, share in _spread(footprint / 10.0, KNOTS)
        }

    def _optimizer(self, work: StageWork) -> Seconds:
        if not work.optimized:
            return {}
        device = self._machine.kinds[0][0].name
        whole = self._machine.optimizer_s(work.optimized_bytes, work.optimized)
        size = work.optimized_bytes / work.optimized
        return {
            Column(device, "step", OPTIMIZER, knot): share * whole
            for knot, share in _spread(size, KNOTS)
        }


def _traits(
    at: int, seconds: Mapping[Column, float], footprint: float, work: StageWork, together: float
) -> tuple[float, ...]:
    whole = analytic_s(seconds)
    share = {"call": 0.0, "product": 0.0}
    for column, part in seconds.items():
        if column.family in share:
            share[column.family] += part
    inner = math.prod(size for name, size in work.axes if name != "data")
    return (
        math.log10(max(whole, 1e-7)),
        share["call"] / whole if whole else 0.0,
        share["product"] / whole if whole else 0.0,
        math.log10(footprint),
        float(1 <= at < len(PIECES)),
        _RECOMPUTED.get(work.recompute, 0.0) if at else 0.0,
        math.log2(inner),
        together,
    )
