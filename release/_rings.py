"""Collectives as NCCL runs them on few nodes: one ring through all devices.

Over several nodes the cost model lets every device take its own part of a value across, as the
best known algorithms do. A ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
algorithms") instead carries nearly the whole value, twice for an all-reduce, through the ports of
every node, which its devices have together.
"""

from __future__ import annotations

import dataclasses
import math

from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import MeshSlice
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import StageCode, StageCost, register_cost_model
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.sharding.convert import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER

_VOLUME = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}


class RingMachine(MeshMachine):
    """A mesh whose collectives over nodes are rings."""

    def collective_s(self, axis_name: str, kind: str, nbytes: float) -> float:
        """Seconds of one collective over one axis; see `MeshMachine.collective_s`."""
        best = super().collective_s(axis_name, kind, nbytes)
        if kind not in _VOLUME:
            return best
        rates = self.calibration.across.collective(kind)
        times = [best]
        for line in self._lines(axis_name):
            if line.nodes > 1:
                volume = _VOLUME[kind] * nbytes * (line.size - 1) / line.size
                ports = line.together * line.across.bandwidth * rates.efficiency
                rounds = _VOLUME[kind] * math.ceil(math.log2(line.size))
                times.append(rounds * rates.latency + volume / ports)
        return max(times)


def rings(machine: MeshMachine) -> RingMachine:
    """The same mesh with rings."""
    own = {f.name: getattr(machine, f.name) for f in dataclasses.fields(machine)}
    return RingMachine(**own)


def ring_machine(cluster: Cluster, mesh: MeshSlice, calibration: Calibration) -> RingMachine:
    """`machine_of`, with rings."""
    return rings(machine_of(cluster, mesh, calibration))


@register_cost_model
class AnalyticRings(AnalyticCost):
    """Prices collectives over several nodes as rings."""

    name = "analytic_rings"

    def stage_cost(
        self, stage: StageCode, machine: MeshMachine, *, optimizer_states: int = 2
    ) -> StageCost:
        """What `stage` costs; see `CostModel`."""
        return super().stage_cost(stage, rings(machine), optimizer_states=optimizer_states)
