"""Which ops of a model cannot be split over a mesh axis, and how much of its work they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.graph.build import CleanGraph
from raypar.graph.costs import forward_flops, is_view
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.emit import is_op
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules.base import OpView, find_rule
from raypar.sharding.strategies import choices


@dataclass(frozen=True)
class Coverage:
    """What of a graph has to be computed whole on every rank of an axis.

    Attributes:
        size: Ranks of the axis.
        flops: Forward floating-point operations of the whole graph.
        whole: Op name → (ops of that name without a choice, their forward operations), most work
            first; views are left out.
        without_rule: Names among them for which there is no rule at all.
    """

    size: int
    flops: int
    whole: dict[str, tuple[int, int]]
    without_rule: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the forward operations that every rank repeats."""
        return sum(flops for _, flops in self.whole.values()) / max(self.flops, 1)

    def __str__(self) -> str:
        """One line: the share, and the names with the most work."""
        names = ", ".join(f"{name} ({count})" for name, (count, _) in list(self.whole.items())[:4])
        return f"{self.share:.1%} of the forward FLOPs are not split{': ' if names else ''}{names}"


def coverage(graph: OpGraph | CleanGraph, size: int = 2, ids: Sequence[str] = ()) -> Coverage:
    """Looks for ops whose only choice on an axis is to be computed whole.

    Args:
        graph: The model; sizes that do not divide by `size` count as a lack of choice.
        size: Ranks of the axis.
        ids: The ops to look at; default: all.
    """
    clean = graph.clean if isinstance(graph, OpGraph) else graph
    annotate_blocks(clean.graph)
    wanted = set(ids)
    total = 0
    whole: dict[str, tuple[int, int]] = {}
    lacking: set[str] = set()
    for node in clean.ops:
        if not is_op(node) or (wanted and node.meta["id"] not in wanted):
            continue
        work = forward_flops(node)
        total += work
        op = OpView(node)
        if is_view(node) or not op.results or len(choices(op, size)) > 1:
            continue
        count, flops = whole.get(op.name, (0, 0))
        whole[op.name] = (count + 1, flops + work)
        if find_rule(op.name) is None:
            lacking.add(op.name)
    ordered = dict(sorted(whole.items(), key=lambda item: -item[1][1]))
    return Coverage(size, total, ordered, tuple(sorted(lacking)))
