"""What does not fit the memory of the devices is computed again, and that takes time.

When the loss of a microbatch is known, all of its stages have gone forward and none has gone back:
whatever the schedule, the ranks of the replica then hold all that its backward pass reads, but for
what backward computes again (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", the
trade that recomputation is). What products make, and backward reads, is held at least once by the
ranks of the replica, or the product runs again on all of them. Which products those are is a
knapsack problem; its continuous relaxation (Dantzig 1957, "Discrete-Variable Extremum Problems")
frees the bytes that are cheapest to make again first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MeshSlice
from raypar.search.bounds.one_op import Kernel
from raypar.search.bounds.rates import Floats
from raypar.search.config import SearchConfig
from raypar.search.cost.machine import machine_of


@dataclass(frozen=True)
class Room:
    """What a cut of the batch needs beside what its devices can hold for one microbatch.

    Attributes:
        needed: Bytes of one microbatch of one replica that backward reads.
        held: Bytes that the devices of a replica can hold of it.
    """

    needed: float
    held: float

    @property
    def over(self) -> float:
        """Bytes that are computed again."""
        return max(0.0, self.needed - self.held)


def room_of(
    kernels: Sequence[Kernel],
    trained: Mapping[int, int],
    usable: Sequence[float],
    *,
    replicas: int,
    optimizer_states: int,
) -> Room:
    """How much one microbatch needs, and how much of it can be held.

    Every part of a trained parameter, and of its optimizer's states, is held at least once. All
    replicas compute the same again, so that the one with the least memory decides: its share is no
    larger than the mean.

    Args:
        kernels: Of one microbatch on one replica.
        trained: Bytes of a trained parameter → how many such there are.
        usable: Bytes that a plan may fill on each of the most devices that it uses.
        replicas: D.
        optimizer_states: Tensors that the optimizer keeps per parameter.
    """
    resident = (1 + optimizer_states) * sum(n * count for n, count in trained.items())
    held = max(0.0, sum(usable) - resident) / replicas
    return Room(sum(k.kept for k in kernels), held)


def usable_bytes(cluster: Cluster, calibration: Calibration, config: SearchConfig) -> list[float]:
    """Bytes that a plan may fill on each device, beside what libraries take; most first."""
    sizes: list[float] = []
    for index, node in enumerate(cluster.nodes):
        first = cluster.devices_of(index)[0]
        machine = machine_of(cluster, MeshSlice((first,), (1,), (DATA,)), calibration)
        usable = config.memory_fraction * machine.memory_bytes - machine.reserved_bytes(0)
        sizes += [max(0.0, usable)] * node.devices
    return sorted(sizes, reverse=True)


def again_s(kernels: Sequence[Kernel], priced: Floats, room: Room) -> float:
    """The least price of what is computed again.

    Args:
        kernels: Of one microbatch on one replica.
        priced: Per kernel the price of all of its runs in a step.
        room: What does not fit.
    """
    kept = [
        (float(price) / kernel.times / kernel.most_kept, kernel.kept)
        for kernel, price in zip(kernels, priced, strict=True)
        if kernel.kept > 0
    ]
    left, total = room.over, 0.0
    for per_byte, nbytes in sorted(kept):
        freed = min(left, nbytes)
        total += freed * per_byte
        left -= freed
    return total
