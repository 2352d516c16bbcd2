"""Piper's cost model, written down as it is published (Tarnawski et al. 2021, section 3).

For a stage of layers V with d replicas of t devices each, W the bandwidth and B the microbatches:

- edges = sum over values that are cut at a layer of V, of 2 (bytes + sync bytes of that layer);
- gradients = 4 (d - 1)/d · parameter bytes / B;
- load = (edges/d + gradients)/W + compute/d;
- flights y = ceil(replicas of this and all later stages / d); bytes = sum of A·y + B over V.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raypar.graph.workloads import LayerVariant, LayerWorkload
from raypar.search.exact._piper_lattice import Order


@dataclass(frozen=True)
class PiperSetting:
    """The machine and the step that a workload is planned for.

    Attributes:
        devices: k.
        memory: M, bytes of one device.
        microbatches: B.
        bandwidth: W, bytes per second.
    """

    devices: int
    memory: float
    microbatches: int
    bandwidth: float

    @property
    def sync(self) -> float:
        """Seconds per parameter byte for (d - 1)/d of a gradient sum, per microbatch."""
        return 4.0 / self.microbatches / self.bandwidth


class Formula:
    """Loads of stages.

    Args:
        workload: The layers.
        order: Their positions.
        setting: The machine.
    """

    def __init__(self, workload: LayerWorkload, order: Order, setting: PiperSetting) -> None:
        self.setting = setting
        n = len(order.layers)
        self._into: list[list[tuple[int, int, float]]] = [[] for _ in range(n)]
        self._out: list[list[tuple[int, int, float]]] = [[] for _ in range(n)]
        for edge in workload.edges:
            source, target = order.position[edge.source], order.position[edge.target]
            self._into[target].append((source, edge.source, edge.nbytes))
            self._out[source].append((target, edge.target, edge.nbytes))

    def load(
        self, positions: Sequence[int], variants: Sequence[LayerVariant], replicas: int
    ) -> float:
        """Seconds per microbatch of a stage.

        Args:
            positions: Its layers.
            variants: How each of them runs.
            replicas: d.
        """
        inside = set(positions)
        edges = math.fsum(
            nbytes
            for p, v in zip(positions, variants, strict=True)
            for nbytes in (*self._own(p, inside), *self._syncs(p, v, inside))
        )
        weights = math.fsum(v.parameter_bytes for v in variants)
        seconds = math.fsum(v.seconds for v in variants)
        gradients = 4.0 * (replicas - 1) / replicas * weights / self.setting.microbatches
        return (edges / replicas + gradients) / self.setting.bandwidth + seconds / replicas

    def share(
        self, position: int, variant: LayerVariant, inside: Collection[int], replicas: int
    ) -> float:
        """What a layer's variant adds to replicas × load of a stage, but for the values' bytes."""
        gradients = (replicas - 1) * self.setting.sync * variant.parameter_bytes
        syncs = math.fsum(self._syncs(position, variant, inside)) / self.setting.bandwidth
        return variant.seconds + gradients + syncs

    def _own(self, position: int, inside: Collection[int]) -> list[float]:
        values = (*self._into[position], *self._out[position])
        return [2.0 * nbytes for other, _, nbytes in values if other not in inside]

    def _syncs(self, position: int, variant: LayerVariant, inside: Collection[int]) -> list[float]:
        into, out = self._into[position], self._out[position]
        found = [variant.sync_forward.get(one, 0.0) for p, one, _ in into if p not in inside]
        found += [variant.sync_backward.get(one, 0.0) for p, one, _ in out if p not in inside]
        return [2.0 * nbytes for nbytes in found]


def bytes_in(variant: LayerVariant, flights: int) -> float:
    """Bytes of a layer with that many microbatches in flight."""
    return variant.bytes_per_flight * flights + variant.bytes_always
