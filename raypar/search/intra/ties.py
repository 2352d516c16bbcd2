"""Which ops are decided together: the repetitions of a layer.

Ops that do the same on the same shapes under the same module path (numbers aside) are told apart by
what surrounds them: colour refinement, two rounds (Weisfeiler and Leman 1968). The ops at the ends
of a stack, whose surroundings are like no other's, join the largest class that looks like them from
nearer by. A tie only takes choices away, so that any classes are right; good ones lose little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from torch import fx

from raypar.compat import pytree
from raypar.search.intra.settings import Graph
from raypar.sharding.rules.base import Strategy
from raypar.sharding.strategies import pattern_of

_ROUNDS = 2


def tie(graph: Graph, options: Mapping[fx.Node, Sequence[Strategy]]) -> list[list[fx.Node]]:
    """Classes of ops that are decided together, by their first op; members in graph order.

    Args:
        graph: The graph.
        options: Op → its strategies; only ops with equal ones are tied.
    """
    levels = [_own_colours(graph, options)]
    for _ in range(_ROUNDS):
        levels.append(_refine(graph, levels[-1]))
    classes = list(_buckets(graph.ops, levels[-1]).values())
    for level in reversed(levels[:-1]):
        classes = _join_singles(classes, level)
    at = {op: i for i, op in enumerate(graph.ops)}
    ordered = [sorted(members, key=at.__getitem__) for members in classes]
    return sorted(ordered, key=lambda members: at[members[0]])


def split(classes: Sequence[Sequence[fx.Node]], parts: int) -> list[list[fx.Node]]:
    """Cuts every class: half of it, half of the rest, and so on, `parts` pieces at most.

    Sizes that halve let a limit be met to within the smallest piece.
    """
    found: list[list[fx.Node]] = []
    for members in classes:
        rest = list(members)
        for _ in range(parts - 1):
            if len(rest) < 2:
                break
            half = (len(rest) + 1) // 2
            found.append(rest[:half])
            rest = rest[half:]
        found.append(rest)
    return found


def twins_of(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Op → the first op that does the same on tensors that lie the same, itself perhaps."""
    first: dict[Hashable, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for op in graph.ops:
        reads = graph.reads[op]
        same = tuple(reads.index(value) for value in reads)
        lie = tuple(str(value.tensor.stride()) for value in (*reads, *graph.makes[op]))
        found[op] = first.setdefault((_deed(graph, op), same, lie), op)
    return found


def _own_colours(
    graph: Graph, options: Mapping[fx.Node, Sequence[Strategy]]
) -> dict[fx.Node, Hashable]:
    """What an op does by itself; its module path without numbers."""
    number: dict[Hashable, int] = {}
    found: dict[fx.Node, Hashable] = {}
    for op in graph.ops:
        pattern = pattern_of(str(op.meta["id"]))
        # Which of several like it an op is counts from the start of its module: of a numbered one.
        path = pattern if "*" in pattern else pattern.partition("/")[0]
        choices = tuple(options[op]) if len(options[op]) < 2 else id(options[op])
        key = path, choices, _deed(graph, op)
        found[op] = number.setdefault(key, len(number))
    return found


def _deed(graph: Graph, op: fx.Node) -> Hashable:
    """What an op does, on which shapes, and which gradients it makes."""
    parts: list[Hashable] = [op.target, str(op.meta.get("autocast"))]
    for leaf in pytree.tree_leaves((op.args, op.kwargs)):
        parts.append(None if isinstance(leaf, fx.Node) else str(leaf))
    for value in graph.reads[op]:
        kind = value.id.partition(":")[0] if value.node.op == "placeholder" else "op"
        parts.append((kind, value.form, value in graph.flow))
    parts.append(any(v in graph.flow for v in graph.makes[op]))
    return tuple(parts)


def _refine(graph: Graph, colours: Mapping[fx.Node, Hashable]) -> dict[fx.Node, Hashable]:
    """Colours that also say what made an op's inputs and who reads its results."""
    readers: dict[fx.Node, set[Hashable]] = defaultdict(set)
    for op in graph.ops:
        for position, value in enumerate(graph.reads[op]):
            readers[value.node].add((value.index, position, colours[op]))
    number: dict[Hashable, int] = {}
    found: dict[fx.Node, Hashable] = {}
    for op in graph.ops:
        made = tuple(colours.get(v.node, v.id.partition(":")[0]) for v in graph.reads[op])
        key = (colours[op], made, frozenset(readers[op]))
        found[op] = number.setdefault(key, len(number))
    return found


def _buckets(
    ops: Sequence[fx.Node], colours: Mapping[fx.Node, Hashable]
) -> dict[Hashable, list[fx.Node]]:
    found: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for op in ops:
        found[colours[op]].append(op)
    return found


def _join_singles(
    classes: list[list[fx.Node]], level: Mapping[fx.Node, Hashable]
) -> list[list[fx.Node]]:
    """Lets classes of one join the largest class of equal colour at a coarser level."""
    by_colour: dict[Hashable, list[list[fx.Node]]] = defaultdict(list)
    for members in classes:
        by_colour[level[members[0]]].append(members)
    found: list[list[fx.Node]] = []
    for alike in by_colour.values():
        singles = [c[0] for c in alike if len(c) == 1]
        larger = [list(c) for c in alike if len(c) > 1]
        if larger:
            max(larger, key=len).extend(singles)
            found += larger
        else:
            found.append(singles)
    return found
