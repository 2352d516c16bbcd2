"""Balanced cuts: stages of nearly equal work, cut where little crosses."""

from __future__ import annotations

import math

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph

FLOPS_PER_CUT_BYTE = 20.0
"""Weight of a byte that crosses a cut where nothing is known of the cluster."""

# A byte that an op reads or writes weighs as much as this many FLOPs.
_FLOPS_PER_BYTE = 2.0


def balanced_cuts(
    graph: OpGraph, n_stages: int, flops_per_cut_byte: float = FLOPS_PER_CUT_BYTE
) -> list[int]:
    """Cut positions that minimise the heaviest stage: its work plus the bytes that enter it.

    Dynamic programming over the graph's cuts; a stage's work counts forward and twice that for
    backward, its entering bytes count for both directions.

    Args:
        graph: The captured model.
        n_stages: Number of stages.
        flops_per_cut_byte: A device's FLOP/s over its link's bytes/s.

    Raises:
        PlanError: Fewer places to cut than asked for.
    """
    if n_stages == 1:
        return []
    if len(graph.cuts) < n_stages - 1:
        raise PlanError(
            f"{n_stages} stages need {n_stages - 1} cuts, the graph has {len(graph.cuts)}"
        )
    prefix = [0.0]
    for op in graph.ops:
        prefix.append(prefix[-1] + 3 * (op.flops + _FLOPS_PER_BYTE * op.nbytes))
    crossing = crossing_bytes(graph)
    bounds = [*graph.cuts, len(graph.ops)]
    entry = {0: 0.0, **{c: 2 * flops_per_cut_byte * crossing[c] for c in graph.cuts}}
    # best[k][i]: least heaviest load of k + 1 stages that end at bounds[i].
    best = [[prefix[b] for b in bounds]]
    choice: list[list[int]] = [[-1] * len(bounds)]
    for k in range(1, n_stages):
        row, picks = [math.inf] * len(bounds), [-1] * len(bounds)
        for i in range(k, len(bounds)):
            for j in range(i - 1, k - 2, -1):
                work = prefix[bounds[i]] - prefix[bounds[j]]
                if work >= row[i]:
                    break  # earlier starts only add work
                load = max(best[-1][j], work + entry[bounds[j]])
                if load < row[i]:
                    row[i], picks[i] = load, j
        best.append(row)
        choice.append(picks)
    at, cuts = len(bounds) - 1, []
    for k in range(n_stages - 1, 0, -1):
        at = choice[k][at]
        cuts.append(bounds[at])
    return cuts[::-1]


def crossing_bytes(graph: OpGraph) -> list[int]:
    """Bytes that cross each position; cheap values that a stage makes itself do not count."""
    change = [0] * (len(graph.ops) + 1)
    last: dict[str, int] = {}
    for i, op in enumerate(graph.ops):
        for key in op.inputs:
            last[key] = i
    for i, op in enumerate(graph.ops):
        end = last.get(op.id)
        if end is not None and op.id not in graph.cloneable and op.id not in graph.analysis.globals:
            change[i + 1] += op.out_bytes
            if end + 1 < len(change):
                change[end + 1] -= op.out_bytes
    total, crossing = 0, []
    for delta in change:
        total += delta
        crossing.append(total)
    return crossing
