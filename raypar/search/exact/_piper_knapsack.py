"""Which variant every layer of a stage takes: least seconds under the memory of a device.

A multiple-choice knapsack. Bounds for many stages at once come from its linear relaxation with one
branching (after Martello and Toth 1990, "Knapsack Problems", section 2.3: the item that breaks the
relaxation is taken or left; here all items that save as much as it does are counted together);
single stages are solved exactly by dominance lists (Nemhauser and Ullmann 1969) cut by the
relaxation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Choice = Sequence[tuple[float, float]]
"""(cost, bytes) of every variant of a layer."""

_TINY = 1e-12


@dataclass(frozen=True)
class Steps:
    """Steps from every layer's cheapest variant to leaner ones, best ratio first.

    Attributes:
        layer: Position of the layer.
        cost: Seconds that the step adds.
        saving: Bytes that it saves.
        kind: Steps that save equally much share a number; -1 where a layer has several steps.
    """

    layer: npt.NDArray[np.intp]
    cost: Array
    saving: Array
    kind: npt.NDArray[np.intp]

    def stacked(self) -> Steps:
        """For one stage."""
        return Steps(self.layer[None], self.cost[None], self.saving[None], self.kind[None])


def steps_of(choices: Sequence[Choice]) -> Steps:
    """The steps along the convex hull of every layer's variants.

    Args:
        choices: Per layer its variants; empty where it has none.
    """
    found: list[tuple[float, float, float, int, bool]] = []
    for layer, choice in enumerate(choices):
        hull = _hull(choice)
        single = len(hull) == 2 and len(_efficient(choice)) == 2
        for (c0, m0), (c1, m1) in itertools.pairwise(hull):
            found.append(((c1 - c0) / (m0 - m1), c1 - c0, m0 - m1, layer, single))
    found.sort()
    savings = {s: i for i, s in enumerate(sorted({f[2] for f in found}))}
    return Steps(
        np.array([f[3] for f in found], dtype=np.intp),
        np.array([f[1] for f in found]),
        np.array([f[2] for f in found]),
        np.array([savings[f[2]] if f[4] else -1 for f in found], dtype=np.intp),
    )


def steps_of_pairs(seconds: Array, nbytes: Array) -> Steps:
    """As `steps_of`, for layers of two variants.

    Args:
        seconds: ``[layer, variant]``.
        nbytes: Likewise.
    """
    cost = np.abs(seconds[:, 1] - seconds[:, 0])
    saving = np.where(seconds[:, 0] < seconds[:, 1], 1.0, -1.0) * (nbytes[:, 0] - nbytes[:, 1])
    layer = np.flatnonzero((cost > 0) & (saving > 0))
    cost, saving = cost[layer], saving[layer]
    order = np.lexsort((saving, cost, cost / saving))
    kind = np.unique(saving, return_inverse=True)[1]
    return Steps(layer[order], cost[order], saving[order], kind[order])


def cheapest(choice: Choice) -> tuple[float, float]:
    """(cost, bytes) of the variant with the least cost; of equals the leanest."""
    return min(choice)


def _efficient(choice: Choice) -> list[tuple[float, float]]:
    """Variants that no other beats, from the cheapest to the leanest."""
    kept: list[tuple[float, float]] = []
    for cost, nbytes in sorted(choice):
        if not kept or nbytes < kept[-1][1]:
            kept.append((cost, nbytes))
    return kept


def _hull(choice: Choice) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for point in _efficient(choice):
        while len(hull) > 1 and _ratio(hull[-2], point) <= _ratio(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _ratio(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[0] - one[0]) / (one[1] - other[1])


def bounds(steps: Steps, inside: npt.NDArray[np.uint8], need: Array) -> tuple[Array, Array]:
    """Bounds of the seconds that it takes to save `need` bytes, for many stages at once.

    Args:
        steps: The steps of all layers, in arrays ``[stage, step]``.
        inside: ``[stage, layer]``: 1 where the layer is in the stage.
        need: Bytes per stage to be saved, more than 0, and no more than its steps save together.

    Returns:
        (no more than the optimum, of a choice that exists).
    """
    rows = np.arange(len(need))
    there = np.take_along_axis(inside, steps.layer, axis=1).astype(bool)
    saving = there * steps.saving
    cost = there * steps.cost
    saved = np.cumsum(saving, axis=1)
    spent = np.cumsum(cost, axis=1)
    breaks = (saved >= need[:, None] * (1 - _TINY)).argmax(axis=1)
    last_saving, last_cost = saving[rows, breaks], cost[rows, breaks]
    before_saved = saved[rows, breaks] - last_saving
    before_cost = spent[rows, breaks] - last_cost
    short = np.maximum(need - before_saved, 0.0)
    share = np.divide(short, last_saving, out=np.ones_like(short), where=last_saving > 0)
    relaxed = before_cost + last_cost * np.minimum(share, 1.0)
    at = np.arange(steps.layer.shape[1])[None, :]
    kind = steps.kind[rows, breaks]
    alike = steps.kind == kind[:, None]
    less = before_cost + _filled(saving, cost, (at > breaks[:, None]) & ~alike, short)
    excess = before_saved + last_saving - need
    more = (
        before_cost + last_cost - _released(saving, cost, (at < breaks[:, None]) & ~alike, excess)
    )
    branched = np.where(kind >= 0, np.minimum(less, more), relaxed)
    low = np.maximum(relaxed, branched)
    single = there & (steps.kind >= 0)
    other = np.where(
        single & (at >= breaks[:, None]) & (saving >= short[:, None]), cost, np.inf
    ).min(axis=1)
    dropped = np.where(
        single & (at < breaks[:, None]) & (saving <= excess[:, None]), cost, 0.0
    ).max(axis=1)
    high = np.minimum(before_cost + other, before_cost + last_cost - dropped)
    return low, np.maximum(low, high)


def _filled(saving: Array, cost: Array, allowed: npt.NDArray[np.bool_], need: Array) -> Array:
    """Least cost, in fractions, to save `need` with the allowed steps; infinite if they cannot."""
    rows = np.arange(len(need))
    part = saving * allowed
    saved = np.cumsum(part, axis=1)
    enough = saved[:, -1] >= need * (1 - _TINY)
    ends = (saved >= need[:, None] * (1 - _TINY)).argmax(axis=1)
    spent = np.cumsum(cost * allowed, axis=1)[rows, ends]
    step, price = part[rows, ends], (cost * allowed)[rows, ends]
    over = np.maximum(saved[rows, ends] - need, 0.0)
    share = np.divide(over, step, out=np.zeros_like(over), where=step > 0)
    return np.where(enough, spent - price * np.minimum(share, 1.0), np.inf)


def _released(saving: Array, cost: Array, allowed: npt.NDArray[np.bool_], excess: Array) -> Array:
    """Most cost, in fractions, that leaving out `excess` bytes of the allowed steps gives back."""
    back, price = (saving * allowed)[:, ::-1], (cost * allowed)[:, ::-1]
    rows = np.arange(len(excess))
    saved = np.cumsum(back, axis=1)
    total = price.sum(axis=1)
    over = saved[:, -1] > excess
    ends = (saved > excess[:, None]).argmax(axis=1)
    spent = np.cumsum(price, axis=1)[rows, ends]
    step, last = back[rows, ends], price[rows, ends]
    share = np.divide(saved[rows, ends] - excess, step, out=np.zeros_like(excess), where=step > 0)
    return np.where(over, spent - last * np.minimum(share, 1.0), total)


def solve(choices: Sequence[Choice], memory: float) -> list[int] | None:
    """The variants of least cost that fit, exactly.

    Args:
        choices: (cost, bytes) of every layer's variants.
        memory: Bytes that they may take together.

    Returns:
        The number of the variant per layer; None where nothing fits.
    """
    picks = [min(range(len(c)), key=lambda j, c=c: c[j]) for c in choices]  # type: ignore[misc]
    need = sum(c[j][1] for c, j in zip(choices, picks, strict=True)) - memory
    if need <= 0:
        return picks
    options: list[tuple[float, int, list[tuple[float, float, int]]]] = []
    for layer, (choice, pick) in enumerate(zip(choices, picks, strict=True)):
        ways = [
            (choice[pick][1] - m, c - choice[pick][0], j)
            for j, (c, m) in enumerate(choice)
            if m < choice[pick][1]
        ]
        if ways:
            options.append((min(c / s for s, c, _ in ways), layer, ways))
    options.sort()
    if sum(max(s for s, _, _ in ways) for _, _, ways in options) < need:
        return None
    return _search(picks, options, steps_of(choices), need)


def _search(
    picks: list[int],
    options: Sequence[tuple[float, int, list[tuple[float, float, int]]]],
    steps: Steps,
    need: float,
) -> list[int]:
    """Layer by layer, the choices that no other beats in both bytes saved and cost."""
    inside = np.ones((1, len(picks)), dtype=np.uint8)
    limit = float(bounds(steps.stacked(), inside, np.array([need]))[1][0]) * (1 + 1e-12) + 1e-300
    saved, spent = np.zeros(1), np.zeros(1)
    history: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    left = np.ones(len(steps.layer), dtype=bool)
    for _, layer, ways in options:
        left &= steps.layer != layer
        more_saved = np.concatenate([saved, *(saved + s for s, _, _ in ways)])
        more_spent = np.concatenate([spent, *(spent + c for _, c, _ in ways)])
        parent = np.tile(np.arange(len(saved)), len(ways) + 1)
        pick = np.repeat([-1, *(j for _, _, j in ways)], len(saved))
        most = np.concatenate([[0.0], np.cumsum(steps.saving[left])])
        price = np.concatenate([[0.0], np.cumsum(steps.cost[left])])
        lack = np.maximum(need - more_saved, 0.0)
        hopeful = more_spent + np.interp(lack, most, price) <= limit
        hopeful &= lack <= most[-1] * (1 + _TINY)
        order = np.flatnonzero(hopeful)
        order = order[np.lexsort((more_spent[order], lack[order]))]
        # Of choices that save as much or more, only the cheaper ones stay.
        running = np.minimum.accumulate(more_spent[order])
        first = np.ones(len(order), dtype=bool)
        first[1:] = more_spent[order][1:] < running[:-1]
        order = order[first]
        saved, spent = more_saved[order], more_spent[order]
        history.append((parent[order], pick[order]))
    at = int(np.where(saved >= need, spent, np.inf).argmin())
    chosen = list(picks)
    for (_, layer, _), (parents, made) in zip(reversed(options), reversed(history), strict=True):
        if made[at] >= 0:
            chosen[layer] = int(made[at])
        at = int(parents[at])
    return chosen
