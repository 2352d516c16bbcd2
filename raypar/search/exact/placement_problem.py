"""Device placement as numbers: items with latencies, tensors that join them, loads of devices.

The cost model of Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of DNN Graph
Operators" (NeurIPS), throughput section: an accelerator's load is the latency of what it runs plus
the cost of every tensor that crosses its border, in either direction, once each; a CPU's load is
the latency of what it runs. The objective is the largest load.

An *item* is a set of nodes that share a device: a colour class at first, and more of them as
`raypar.search.exact.placement_reduce` joins items. A *tensor* is a node's output, kept as the set
of items that make or read it: an accelerator pays for it where it holds some of them and not all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypar.graph._workloads_placement import PlacementWorkload

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlacementProblem:
    """Items to place on devices 0 .. accelerators − 1 and CPUs behind them.

    Attributes:
        accelerators: How many.
        cpus: How many.
        memory: Bytes of an accelerator.
        accelerator_s: Per item its latency on an accelerator, in the input's unit of time.
        cpu_s: Per item its latency on a CPU.
        size: Per item its bytes.
        only_cpu: Per item whether no accelerator can run it.
        tensors: Per tensor its items, ascending, at least two.
        cost: Per tensor its cost.
        before: Pairs (u, v): in a contiguous split u's stage is not behind v's.
        members: Per item the positions of its nodes in the workload.
    """

    accelerators: int
    cpus: int
    memory: float
    accelerator_s: Floats
    cpu_s: Floats
    size: Floats
    only_cpu: NDArray[np.bool_]
    tensors: tuple[tuple[int, ...], ...]
    cost: Floats
    before: frozenset[tuple[int, int]]
    members: tuple[tuple[int, ...], ...]

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.members)

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return self.accelerators + self.cpus

    def loads(self, device_of: Sequence[int]) -> Floats:
        """Load of every device.

        Args:
            device_of: Per item its device.
        """
        loads = np.zeros(self.n_devices)
        for item, device in enumerate(device_of):
            times = self.accelerator_s if device < self.accelerators else self.cpu_s
            loads[device] += times[item]
        for items, cost in zip(self.tensors, self.cost, strict=True):
            touched = {device_of[i] for i in items}
            if len(touched) > 1:
                for device in touched:
                    if device < self.accelerators:
                        loads[device] += cost
        return loads

    def fits(self, device_of: Sequence[int]) -> bool:
        """Whether every item may run where it is, within the accelerators' memory."""
        held = np.zeros(self.n_devices)
        for item, device in enumerate(device_of):
            if device < self.accelerators:
                if self.only_cpu[item]:
                    return False
                held[device] += self.size[item]
        return bool((held[: self.accelerators] <= self.memory).all())

    def objective(self, device_of: Sequence[int]) -> float:
        """Largest load; infinite where the placement does not fit."""
        return float(self.loads(device_of).max()) if self.fits(device_of) else float("inf")

    def merged(self, group_of: Sequence[int]) -> PlacementProblem:
        """The problem in which items of one group are one item.

        Args:
            group_of: Per item any number that tells groups apart; new items are in the order of
                their first members.
        """
        number: dict[int, int] = {}
        new = [number.setdefault(group, len(number)) for group in group_of]
        members: list[list[int]] = [[] for _ in number]
        for item, at in enumerate(new):
            members[at] += self.members[item]
        count = len(number)

        def summed(values: Floats) -> Floats:
            return np.bincount(new, weights=values, minlength=count).astype(np.float64)

        tensors, cost = _joined(
            (tuple(sorted({new[i] for i in items})), price)
            for items, price in zip(self.tensors, self.cost, strict=True)
        )
        return PlacementProblem(
            self.accelerators,
            self.cpus,
            self.memory,
            summed(self.accelerator_s),
            summed(self.cpu_s),
            summed(self.size),
            np.bincount(new, weights=self.only_cpu, minlength=count) > 0,
            tensors,
            cost,
            frozenset((new[u], new[v]) for u, v in self.before if new[u] != new[v]),
            tuple(tuple(group) for group in members),
        )


def _joined(
    found: Iterable[tuple[tuple[int, ...], float]],
) -> tuple[tuple[tuple[int, ...], ...], Floats]:
    """Tensors of several items and positive cost; those of equal items as one."""
    total: dict[tuple[int, ...], float] = {}
    for items, price in found:
        if len(items) > 1 and price > 0:
            total[items] = total.get(items, 0.0) + price
    return tuple(total), np.array(list(total.values()), dtype=np.float64)


def problem_of(work: PlacementWorkload) -> PlacementProblem:
    """The problem of a workload, one item per colour class.

    A contiguous split orders its devices so that no edge of the forward pass leads to an earlier
    one; what the backward pass does follows from the colours. A colour without a forward node
    takes its place in that order from its edges to other backward nodes, reversed.
    """
    item_of: list[int] = []
    number: dict[tuple[str, int], int] = {}
    for at, node in enumerate(work.nodes):
        key = ("node", at) if node.colour is None else ("colour", node.colour)
        item_of.append(number.setdefault(key, len(number)))
    count = len(number)
    members: list[list[int]] = [[] for _ in range(count)]
    for at, item in enumerate(item_of):
        members[item].append(at)
    forward = {item_of[at] for at, node in enumerate(work.nodes) if not node.backward}
    before: set[tuple[int, int]] = set()
    readers: dict[int, set[int]] = {}
    for source, target in work.edges:
        u, v = item_of[source], item_of[target]
        readers.setdefault(source, {u}).add(v)
        if u == v:
            continue
        if not work.nodes[target].backward:
            before.add((u, v))
        elif work.nodes[source].backward and not {u, v} <= forward:
            before.add((v, u))
    tensors, cost = _joined(
        (tuple(sorted(items)), work.cost[source]) for source, items in readers.items()
    )

    def summed(values: Sequence[float]) -> Floats:
        weights = np.array(values, dtype=np.float64)
        return np.bincount(item_of, weights=weights, minlength=count).astype(np.float64)

    return PlacementProblem(
        work.accelerators,
        work.cpus,
        work.memory,
        summed([node.accelerator_s for node in work.nodes]),
        summed([node.cpu_s for node in work.nodes]),
        summed([node.bytes for node in work.nodes]),
        summed([not node.on_accelerator for node in work.nodes]) > 0,
        tensors,
        cost,
        frozenset(before),
        tuple(tuple(group) for group in members),
    )


def by_node(problem: PlacementProblem, device_of: Sequence[int]) -> dict[int, int]:
    """Device of every node, by its position in the workload."""
    return {node: device_of[i] for i, nodes in enumerate(problem.members) for node in nodes}


def by_item(problem: PlacementProblem, device_of_node: Mapping[int, int]) -> list[int]:
    """Device of every item of a problem whose items are not split."""
    return [device_of_node[nodes[0]] for nodes in problem.members]
