"""Downsets of a layer graph: the sets of layers that a pipeline may have finished after a stage.

A set is a downset if it holds every predecessor of its members. Stages are differences of nested
downsets, so that any family of downsets that holds the empty and the full set is a search space;
the whole lattice is the complete one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from raypar.graph.workloads import LayerWorkload


class Order:
    """The layers of a workload in a topological order.

    Attributes:
        layers: Layers by position.
        position: Id → position.
        before: Position → bit mask of its predecessors.
        after: Position → positions of its successors.
    """

    def __init__(self, workload: LayerWorkload) -> None:
        readers: dict[int, list[int]] = {layer.id: [] for layer in workload.layers}
        missing = dict.fromkeys(readers, 0)
        for edge in workload.edges:
            readers[edge.source].append(edge.target)
            missing[edge.target] += 1
        by_id = {layer.id: layer for layer in workload.layers}
        ready = [one for one, n in missing.items() if not n]
        for one in ready:  # grows while it is walked
            for target in readers[one]:
                missing[target] -= 1
                if not missing[target]:
                    ready.append(target)
        self.layers = [by_id[one] for one in ready]
        self.position = {one: at for at, one in enumerate(ready)}
        self.before = [0] * len(ready)
        self.after = [[self.position[t] for t in readers[one]] for one in ready]
        for source, targets in enumerate(self.after):
            for target in targets:
                self.before[target] |= 1 << source

    def all_downsets(self, most: int) -> set[int] | None:
        """Every downset as a bit mask; None where there are more than `most`."""
        return _downsets(self.before, self.after, most)

    def coarse_downsets(self, weights: Sequence[float], most: int) -> set[int]:
        """Downsets that cut no group of layers apart; neighbours that weigh little are joined.

        Args:
            weights: Per layer what it matters where it lies.
            most: There are no more than so many.
        """
        group = list(range(len(weights)))
        wanted = len(weights)
        for _, _, group in self.joins(weights):
            if len(set(group)) > wanted * 0.9:
                continue
            wanted = len(set(group))
            found = self._of_groups(group, most)
            if found is not None:
                return found
        return {0, (1 << len(weights)) - 1}

    def _of_groups(self, group: Sequence[int], most: int) -> set[int] | None:
        names = {name: at for at, name in enumerate(dict.fromkeys(group))}
        masks = [0] * len(names)
        before = [0] * len(names)
        after: list[set[int]] = [set() for _ in names]
        for v, name in enumerate(group):
            masks[names[name]] |= 1 << v
            for target in self.after[v]:
                if group[target] != name:
                    before[names[group[target]]] |= 1 << names[name]
                    after[names[name]].add(names[group[target]])
        found = _downsets(before, [sorted(a) for a in after], most)
        if found is None:
            return None
        return {sum(m for at, m in enumerate(masks) if one >> at & 1) for one in found}

    def joins(self, weights: Sequence[float]) -> Iterator[tuple[int, int, list[int]]]:
        """Joins neighbours, lightest first, until there is one group per component.

        Groups stay acyclic: no way leads out of one and back into it.

        Yields:
            (group that takes in, group that is taken in, group of every layer afterwards).
        """
        group = list(range(len(weights)))
        weight = list(weights)
        edges = {(u, v) for u, targets in enumerate(self.after) for v in targets}
        while edges:
            readers: dict[int, set[int]] = {}
            for u, v in edges:
                readers.setdefault(group[u], set()).add(group[v])
            pairs = sorted((weight[a] + weight[b], a, b) for a, bs in readers.items() for b in bs)
            one, other = next((a, b) for _, a, b in pairs if not _roundabout(readers, a, b))
            weight[one] += weight[other]
            group = [one if g == other else g for g in group]
            edges = {(u, v) for u, v in edges if group[u] != group[v]}
            yield one, other, group


def _downsets(before: Sequence[int], after: Sequence[Sequence[int]], most: int) -> set[int] | None:
    """All downsets of a graph given by masks of predecessors and lists of successors."""
    level = {0: sum(1 << v for v, mask in enumerate(before) if not mask)}
    found = {0}
    while level:
        following: dict[int, int] = {}
        for mask, ready in level.items():
            rest = ready
            while rest:
                bit = rest & -rest
                rest ^= bit
                grown = mask | bit
                if grown in following:
                    continue
                opened = ready ^ bit
                for target in after[bit.bit_length() - 1]:
                    if before[target] & grown == before[target]:
                        opened |= 1 << target
                following[grown] = opened
        found.update(following)
        if len(found) > most:
            return None
        level = following
    return found


class Family:
    """Nested candidates for the ends of stages, largest first.

    Args:
        order: The layers.
        masks: Downsets as bit masks; the empty and the full set among them.

    Attributes:
        members: ``[downset, position]``: 1 where the layer is in it.
        words: ``[downset, word]``: the same as 64-bit words.
        levels: Indices of the downsets of every size, from the full set down.
    """

    def __init__(self, order: Order, masks: Iterable[int]) -> None:
        self.order = order
        self.masks = sorted(masks, key=lambda m: (-m.bit_count(), m))
        n = len(order.layers)
        width = -(-n // 64) * 8
        raw = np.frombuffer(
            b"".join(m.to_bytes(width, "little") for m in self.masks), dtype=np.uint8
        ).reshape(len(self.masks), width)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, :n]
        self.members: npt.NDArray[np.uint8] = np.ascontiguousarray(bits)
        self.words: npt.NDArray[np.uint64] = np.ascontiguousarray(raw).view(np.uint64)
        sizes = self.members.sum(axis=1, dtype=np.int64)
        borders = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
        self.levels = [range(a, b) for a, b in itertools.pairwise(borders)]

    def __len__(self) -> int:
        return len(self.masks)

    def between(self, low: int, high: int) -> list[int]:
        """Positions of the layers of downset `high` that are not in `low`."""
        difference = self.masks[high] & ~self.masks[low]
        return [v for v in range(len(self.order.layers)) if difference >> v & 1]

    def nested(
        self, low: npt.NDArray[np.intp], high: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.bool_]:
        """Whether downset `low` is inside `high`, pair by pair."""
        result = np.ones(len(low), dtype=bool)
        for word in range(self.words.shape[1]):
            column = self.words[:, word]
            result &= (column[low] & ~column[high]) == 0
        return result


def thinned(family: Family, weights: Sequence[float], most: int) -> Family:
    """A coarse part of a family: neighbours that weigh little together are not cut apart.

    Args:
        family: The downsets.
        weights: Per layer what it matters where it lies.
        most: About as many downsets are left.
    """
    members = family.members.astype(bool)
    kept = np.ones(len(family), dtype=bool)
    for one, other, _ in family.order.joins(weights):
        if kept.sum() <= most:
            break
        kept &= members[:, one] == members[:, other]
    return Family(family.order, [family.masks[i] for i in np.flatnonzero(kept)])


def _roundabout(readers: Mapping[int, Collection[int]], start: int, end: int) -> bool:
    """Whether `end` can be reached from `start` over others."""
    seen = {end}
    waiting = [one for one in readers[start] if one != end]
    while waiting:
        one = waiting.pop()
        for following in readers.get(one, ()):
            if following == end:
                return True
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def nearest(family: Family, masks: Sequence[int], weights: Sequence[float], most: int) -> Family:
    """The part of a family that is nearest to some downsets.

    Args:
        family: The downsets.
        masks: Some of them.
        weights: Per layer what it matters where it lies.
        most: How many there may be.
    """
    weight = np.array(weights)
    members = family.members.astype(np.float64)
    total = members @ weight
    near = np.full(len(family), np.inf)
    for mask in masks:
        inside = np.array([mask >> v & 1 for v in range(len(weight))])
        difference = total + inside @ weight - 2 * (members @ (weight * inside))
        near = np.minimum(near, difference)
    near[[0, -1]] = 0.0
    chosen = np.argsort(near, kind="stable")[:most]
    return Family(family.order, [family.masks[i] for i in chosen])
