"""Units: the pieces of a model that are never cut, and which of them repeat.

A stage is a run of units. Costs are worked out once for every unit that differs from the others:
`shorten` keeps three of many equal repetitions of a layer (the first, one from the middle, the
last), so that a 128-layer model costs as much to look at as a 5-layer one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from raypar.graph.balance import crossing_bytes
from raypar.graph.build import CleanGraph
from raypar.graph.opgraph import OpGraph

_LONGEST_PERIOD = 8  # units
_FEWEST_REPEATS = 4


@dataclass(frozen=True)
class Units:
    """A model as a sequence of units.

    Attributes:
        bounds: Op positions: unit i is ``[bounds[i], bounds[i + 1])``.
        crossing: Bytes that cross each bound at the global batch size (first and last are 0).
        twin: For every unit the unit that stands for it: itself, or the middle repetition.
        kept: The units that `shorten` keeps, ascending.
    """

    bounds: tuple[int, ...]
    crossing: tuple[int, ...]
    twin: tuple[int, ...]
    kept: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def weight(self, unit: int) -> int:
        """How many units a kept one stands for."""
        return sum(1 for t in self.twin if t == unit)


def find_units(graph: OpGraph, most: int = 128, least: int = 1) -> Units:
    """Cuts a model into units at layer borders, and inside layers where as little crosses.

    Args:
        graph: The captured model.
        most: Most units; neighbours are joined, equally in all repetitions, to stay below it.
        least: Fewest units; where layers give fewer, the model may be cut anywhere it can be.
    """
    cuts = set(graph.cuts)
    crossing = crossing_bytes(graph)
    borders = [layer.first for layer in graph.layers if layer.first in cuts]
    inner: list[int] = []
    limits = [0, *borders, len(graph.ops)]
    for first, last in itertools.pairwise(limits):
        lean = min((crossing[k] for k in (first, last) if 0 < k < len(graph.ops)), default=0)
        inner += _thin([k for k in range(first + 1, last) if k in cuts and crossing[k] <= lean])
    bounds = sorted({*borders, *inner})
    if len(bounds) >= most:
        bounds = borders
    step = 1
    while len(bounds[::step]) >= most:
        step += 1
    bounds = bounds[::step]
    if len(bounds) + 1 < least:
        bounds = list(graph.cuts)
    chosen = sorted({0, *bounds, len(graph.ops)})
    twin = _twins(graph, chosen)
    kept = sorted(set(twin))
    return Units(
        tuple(chosen),
        tuple(crossing[k] if 0 < k < len(graph.ops) else 0 for k in chosen),
        twin,
        tuple(kept),
    )


def _thin(cuts: Sequence[int]) -> list[int]:
    """Of neighbouring cuts the last of each run."""
    return [k for i, k in enumerate(cuts) if i + 1 == len(cuts) or cuts[i + 1] != k + 1]


def _twins(graph: OpGraph, bounds: Sequence[int]) -> tuple[int, ...]:
    signatures = _signatures(graph, bounds)
    last_reader = _last_readers(graph, bounds)
    twin = list(range(len(signatures)))
    start = 0
    while start < len(signatures):
        period, repeats = _run(signatures, start)
        if repeats < _FEWEST_REPEATS:
            start += 1
            continue
        end = start + period * repeats
        # A middle repetition may go only if nothing behind the next one reads it.
        if all(last_reader[u] <= u + 2 * period for u in range(start + period, end - period)):
            for u in range(start + 2 * period, end - period):
                twin[u] = start + period + (u - start) % period
        start = end
    return tuple(twin)


def _signatures(graph: OpGraph, bounds: Sequence[int]) -> list[int]:
    """Per unit a hash of its work and of where its inputs come from, relative to itself."""
    found = []
    for u, (first, last) in enumerate(itertools.pairwise(bounds)):
        parts: list[object] = []
        for op in graph.ops[first:last]:
            sources: list[object] = []
            for key in op.inputs:
                at = graph.index.get(key)
                if at is None:
                    kind = key.split(":")[0]
                    shape = graph.params[key[6:]][0] if kind == "param" else key
                    sources.append((kind, shape))
                    continue
                unit = bisect.bisect_right(bounds, at) - 1
                near = u - unit <= _LONGEST_PERIOD
                sources.append((u - unit, bounds[unit + 1] - at) if near else ("far", key))
            parts.append((op.name, op.arguments, op.shapes, op.dtypes, tuple(sources)))
        found.append(hash(tuple(parts)))
    return found


def _last_readers(graph: OpGraph, bounds: Sequence[int]) -> list[int]:
    """Per unit the last unit that reads a value made in it."""
    found = list(range(len(bounds) - 1))
    for i, op in enumerate(graph.ops):
        unit = bisect.bisect_right(bounds, i) - 1
        for key in op.inputs:
            at = graph.index.get(key)
            if at is not None and key not in graph.cloneable:
                source = bisect.bisect_right(bounds, at) - 1
                found[source] = max(found[source], unit)
    return found


def _run(signatures: Sequence[int], start: int) -> tuple[int, int]:
    """(period, repetitions) of the longest repetition that begins at `start`."""
    best = (1, 1)
    for period in range(1, _LONGEST_PERIOD + 1):
        length = period
        while (
            start + length < len(signatures)
            and signatures[start + length] == signatures[start + length - period]
        ):
            length += 1
        repeats = length // period
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def shorten(clean: CleanGraph, units: Units) -> tuple[fx.Graph, list[list[fx.Node]]]:
    """The graph without the units that others stand for.

    Readers of a dropped repetition read the middle one instead, which made the same values.

    Args:
        clean: The graph at any batch size.
        units: Its units.

    Returns:
        The short graph, with the loss as its only output, and the ops of every unit of it (empty
        for dropped ones).
    """
    ops = clean.ops
    position = {node: i for i, node in enumerate(ops)}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    members: list[list[fx.Node]] = [[] for _ in range(len(units))]

    def stand_in(node: fx.Node) -> fx.Node:
        at = position.get(node)
        if at is not None and node not in copies:
            unit = bisect.bisect_right(units.bounds, at) - 1
            twin = units.twin[unit]
            node = ops[units.bounds[twin] + at - units.bounds[unit]]
        return copies[node]

    used = {
        source
        for unit in units.kept
        for node in ops[units.bounds[unit] : units.bounds[unit + 1]]
        for source in node.all_input_nodes
    }
    for node in clean.graph.nodes:
        if node.op == "placeholder" and node in used:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    for unit in units.kept:
        for node in ops[units.bounds[unit] : units.bounds[unit + 1]]:
            copies[node] = graph.node_copy(node, stand_in)
            copies[node].meta = dict(node.meta)
            members[unit].append(copies[node])
    graph.output((stand_in(clean.loss),))
    return graph, members
