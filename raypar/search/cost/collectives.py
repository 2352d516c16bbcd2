"""Collectives, corrected by measured ones: latency and bandwidth by tier, kind and size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from raypar.errors import ClusterError
from raypar.mesh.calibration import ACROSS, INSIDE, Calibration
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import DeviceMesh
from raypar.plan import MeshSlice
from raypar.search.cost.base import Collective
from raypar.search.cost.features import Column
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.regression import Predicted, Priors, Row, WorkRegression
from raypar.search.cost.rows import CollectiveRow

_AXIS = "x"
_BYTE_KNOTS = (3.0, 4.5, 6.0, 7.5)
"""Decimal logarithms of bytes between which bandwidths are interpolated."""
_PRIORS = Priors(common=0.2, family=0.2, kind=0.3, size=0.2, trait=0.03, smooth=0.05, noise=0.1)
"""Links differ more from measurement to measurement than ops do."""


class CollectiveFit:
    """What measured collectives say of others on such a cluster."""

    def __init__(
        self, cluster: Cluster, calibration: Calibration, rows: Sequence[CollectiveRow]
    ) -> None:
        """Learns from measured collectives; those that the cluster has no place for are skipped."""
        self._cluster = cluster
        self._calibration = calibration
        self._regression = WorkRegression(_PRIORS)
        self._factors: dict[tuple[str, int, str, int], Predicted] = {}
        known = []
        for row in rows:
            machine = self._machine(row.tier, row.size)
            if machine is not None:
                priced = _priced(machine, _AXIS, row.tier, row.size, row.collective, row.nbytes)
                known.append(priced._replace(measured=row.seconds, weight=float(row.count)))
        self._regression.fit(known)

    def _machine(self, tier: str, size: int) -> MeshMachine | None:
        """A row of devices of one node, or one device of each of several nodes."""
        own = [tuple(self._cluster.devices_of(i)) for i in range(len(self._cluster.nodes))]
        devices: tuple[int, ...] | None = None
        if tier == INSIDE:
            devices = next((d[:size] for d in own if len(d) >= size), None)
        elif len(own) >= size:
            devices = tuple(d[0] for d in own[:size])
        if devices is None:
            return None
        mesh = MeshSlice(devices, (size,), (_AXIS,))
        return machine_of(self._cluster, mesh, self._calibration)

    def predict(self, machine: MeshMachine, axis: str, kind: str, nbytes: int) -> Predicted:
        """The factor on the analytic seconds of one collective, and its sigma."""
        tier, size = axis_tier(machine, axis)
        key = (tier, size, kind, nbytes)
        if key not in self._factors:
            row = _priced(machine, axis, tier, size, kind, nbytes)
            (self._factors[key],) = self._regression.predict([row])
        return self._factors[key]

    def corrected(
        self, machine: MeshMachine, collectives: tuple[Collective, ...]
    ) -> tuple[Collective, ...]:
        """The same collectives with the seconds that they are likely to take."""
        if not self._regression.fitted:
            return collectives
        return tuple(
            c._replace(
                seconds=c.seconds * math.exp(self.predict(machine, c.axis, c.kind, c.nbytes).log)
            )
            for c in collectives
        )


def axis_tier(machine: MeshMachine, axis: str) -> tuple[str, int]:
    """Whether an axis of a mesh leaves a node, and its size."""
    mesh = machine.mesh
    if axis not in mesh.axes:
        raise ClusterError(f"the mesh has no axis {axis!r}; it has {', '.join(mesh.axes)}")
    lines = DeviceMesh("tiers", mesh.devices, mesh.shape, mesh.axes).lines(axis)
    nodes = [Counter(machine.cluster.device(mesh.devices[p])[0] for p in line) for line in lines]
    size = mesh.shape[mesh.axes.index(axis)]
    return (ACROSS if any(len(own) > 1 for own in nodes) else INSIDE), size


def _priced(machine: MeshMachine, axis: str, tier: str, size: int, kind: str, nbytes: float) -> Row:
    """A collective's analytic seconds: what its rounds cost, and what its bytes do."""
    whole = machine.collective_s(axis, kind, nbytes)
    rounds = min(machine.collective_s(axis, kind, 0), whole)
    at = (math.log10(max(nbytes, 1.0)) - _BYTE_KNOTS[0]) / (_BYTE_KNOTS[1] - _BYTE_KNOTS[0])
    at = min(max(at, 0.0), len(_BYTE_KNOTS) - 1.0)
    low = min(int(at), len(_BYTE_KNOTS) - 2)
    seconds = {
        Column(tier, "latency", kind): rounds,
        Column(tier, "bandwidth", kind, low): (whole - rounds) * (1.0 - (at - low)),
        Column(tier, "bandwidth", kind, low + 1): (whole - rounds) * (at - low),
    }
    traits = (math.log2(size), math.log10(max(nbytes, 1.0)))
    return Row({c: s for c, s in seconds.items() if s > 0.0}, traits)
