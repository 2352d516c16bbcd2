"""A mesh of devices as something that takes time: compute, collectives, messages, memory.

Compute is a roofline (Williams et al. 2009, "Roofline"): an op takes as long as its products or its
memory traffic, whichever is longer, plus a fixed overhead. Communication is latency plus size over
bandwidth (Hockney 1994): bytes per device as the best known algorithm moves them (Thakur et al.
2005, "Optimization of collective communication operations in MPICH").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raypar.errors import ClusterError
from raypar.mesh.calibration import Calibration, DeviceRates, TierRates, table_calibration
from raypar.mesh.cluster import Cluster
from raypar.mesh.device_mesh import DeviceMesh
from raypar.mesh.devices import DTYPES, DeviceKind, Link
from raypar.plan import MeshSlice
from raypar.sharding.convert import (
    ALL_GATHER,
    ALL_MAX,
    ALL_REDUCE,
    ALL_TO_ALL,
    COLLECTIVES,
    REDUCE_SCATTER,
)

_VOLUME = {ALL_REDUCE: 2, ALL_MAX: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1, ALL_TO_ALL: 1}
"""How often each device moves its share of the value."""
_CALLS = ("view", "none")
"""Kinds that move nothing: an op that only looks at its input, and what is no op at all."""


class _Line(NamedTuple):
    """Devices that differ along one axis: `size` of them, at least `together` on each node."""

    size: int
    together: int
    inside: Link
    across: Link

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.together)


# A GPU's driver and the buffers of a communicator; and what a caching allocator loses to blocks
# that fit no request.
_GPU_FIXED_BYTES = 900 << 20
_GPU_FRAGMENTED = 0.05


@dataclass
class MeshMachine:
    """One mesh of a cluster; see `machine_of`.

    The slowest device and the slowest line of an axis count.

    Attributes:
        cluster: The cluster.
        mesh: The devices.
        calibration: What they reach.
        memory_bytes: Bytes that the smallest device may fill.
        kinds: The device kinds of the mesh with their rates.
    """

    cluster: Cluster
    mesh: MeshSlice
    calibration: Calibration
    memory_bytes: int
    kinds: tuple[tuple[DeviceKind, DeviceRates], ...]
    _axes: dict[str, tuple[_Line, ...]] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """Whether a device has a memory of its own."""
        return self.kinds[0][0].is_gpu

    def reserved_bytes(self, used: float) -> int:
        """What drivers, communicators and the allocator take of a device's memory.

        Args:
            used: Bytes that are held besides.
        """
        return int(_GPU_FIXED_BYTES + _GPU_FRAGMENTED * used) if self.is_gpu else 0

    @property
    def overhead_s(self) -> float:
        """Seconds that one op costs on the slowest device besides its work."""
        return max(rates.overhead for _, rates in self.kinds)

    def compute_s(
        self,
        flops: float,
        nbytes: float,
        dtype: str = "float32",
        matmul: bool = True,
        kind: str = "",
        calls: float = 1.0,
    ) -> float:
        """Seconds of one op on one device.

        Args:
            flops: Its floating-point operations on local shapes.
            nbytes: Bytes it reads and writes.
            dtype: What it computes in (``float32`` or ``torch.float32``); integers count as bytes.
            matmul: Whether its work grows faster than its data.
            kind: Form of the product (``conv``, ``attention``) or class of element-wise op
                (``exp``, ``reduce``, ``gather``), where rates differ; see `DeviceRates`.
            calls: Small ops that it runs inside, one after the other; 0: it is part of another.
        """
        return max(
            _op_seconds(device, rates, flops, nbytes, dtype, matmul, kind)
            + (calls - 1.0) * rates.overhead
            for device, rates in self.kinds
        )

    def optimizer_s(self, nbytes: float, tensors: int = 0) -> float:
        """Seconds of an optimizer step over `nbytes` of parameters in `tensors` tensors."""
        return max(
            rates.optimizer.seconds(nbytes) + tensors * rates.optimizer_overhead
            for _, rates in self.kinds
        )

    def collective_s(self, axis_name: str, kind: str, nbytes: float) -> float:
        """Seconds of one collective over one axis, all lines of the axis at once.

        Args:
            axis_name: Name of the mesh axis.
            kind: One of `raypar.sharding.convert.COLLECTIVES`.
            nbytes: Bytes of the larger side on one device: of the tensor for an all-reduce, of the
                result for an all-gather, of the input for a reduce-scatter and an all-to-all.

        Raises:
            ClusterError: The mesh has no such axis, or there is no such collective.
        """
        if kind not in COLLECTIVES:
            raise ClusterError(f"no collective {kind!r}; there are {', '.join(COLLECTIVES)}")
        inside, across = self.calibration.inside, self.calibration.across
        return max(
            (_collective(line, kind, nbytes, inside, across) for line in self._lines(axis_name)),
            default=0.0,
        )

    def crosses_nodes(self, axis: str) -> bool:
        """Whether devices that differ along an axis are on several nodes.

        Raises:
            ClusterError: The mesh has no such axis.
        """
        return any(line.nodes > 1 for line in self._lines(axis))

    def _lines(self, axis: str) -> tuple[_Line, ...]:
        """The different lines of an axis that have more than one device."""
        found = self._axes.get(axis)
        if found is None:
            if axis not in self.mesh.axes:
                raise ClusterError(
                    f"the mesh has no axis {axis!r}; it has {', '.join(self.mesh.axes)}"
                )
            found = self._axes[axis] = self._survey(axis)
        return found

    def _survey(self, axis: str) -> tuple[_Line, ...]:
        devices, shape, axes = self.mesh.devices, self.mesh.shape, self.mesh.axes
        if shape[axes.index(axis)] == 1:
            return ()
        lines = DeviceMesh("machine", devices, shape, axes).lines(axis)
        return tuple(dict.fromkeys(self._line([devices[p] for p in line]) for line in lines))

    def _line(self, devices: Sequence[int]) -> _Line:
        nodes = Counter(self.cluster.device(d)[0] for d in devices)
        own = [self.cluster.nodes[i] for i in nodes]
        return _Line(
            len(devices),
            min(nodes.values()),
            min((n.inside for n in own), key=lambda link: link.bandwidth),
            min((n.across for n in own), key=lambda link: link.bandwidth),
        )


def machine_of(
    cluster: Cluster, mesh: MeshSlice, calibration: Calibration | None = None
) -> MeshMachine:
    """A mesh as something that takes time.

    Args:
        cluster: What its device numbers refer to.
        mesh: The devices.
        calibration: What they reach; default: the device table.

    Raises:
        ClusterError: A device is not in the cluster.
    """
    calibration = calibration or table_calibration(cluster)
    nodes = {cluster.device(d)[0]: d for d in mesh.devices}
    kinds = {cluster.nodes[i].device.name: cluster.nodes[i].device for i in nodes}
    return MeshMachine(
        cluster,
        mesh,
        calibration,
        min(cluster.memory(d) for d in nodes.values()),
        tuple((kind, calibration.rates(kind)) for kind in kinds.values()),
    )


def p2p_s(
    cluster: Cluster, a: int, b: int, nbytes: float, calibration: Calibration | None = None
) -> float:
    """Seconds of one message from device `a` to device `b`; 0 to itself.

    Raises:
        ClusterError: A device is not in the cluster.
    """
    if a == b:
        return 0.0
    calibration = calibration or table_calibration(cluster)
    inside = cluster.device(a)[0] == cluster.device(b)[0]
    rates = (calibration.inside if inside else calibration.across).p2p
    return rates.latency + nbytes / (cluster.link(a, b).bandwidth * rates.efficiency)


def compute_dtype(dtype: str) -> str:
    """The dtype whose rate an op of `dtype` has; integers go at the rate of float32."""
    name = dtype.removeprefix("torch.")
    return name if name in DTYPES or name.startswith("float8") else "float32"


def _op_seconds(
    device: DeviceKind,
    rates: DeviceRates,
    flops: float,
    nbytes: float,
    dtype: str,
    matmul: bool,
    kind: str,
) -> float:
    if kind in _CALLS:
        return rates.view_overhead if kind == "view" else 0.0
    name = compute_dtype(dtype)
    if matmul:
        work = rates.curve(name, kind).seconds(flops, device.peak(name))
        if kind in rates.memory:
            return rates.overhead + work + rates.memory[kind].seconds(nbytes)
        return rates.overhead + max(work, rates.bytes_curve("plain").seconds(nbytes))
    return rates.overhead + rates.bytes_curve(kind).seconds(nbytes)


def _collective(
    line: _Line, kind: str, nbytes: float, inside: TierRates, across: TierRates
) -> float:
    if line.together == line.size:
        return _one_tier(line.size, kind, nbytes, line.inside, inside)
    flat = _flat(line, kind, nbytes, inside, across)
    if line.together == 1 or kind == ALL_TO_ALL:
        return flat
    # First (or last) inside every node, so that each device takes its part of the value across.
    part = _one_tier(line.nodes, kind, nbytes / line.together, line.across, across)
    if kind in (ALL_REDUCE, ALL_MAX):
        within = sum(
            _one_tier(line.together, half, nbytes, line.inside, inside)
            for half in (REDUCE_SCATTER, ALL_GATHER)
        )
    else:
        within = _one_tier(line.together, kind, nbytes, line.inside, inside)
    return min(flat, part + within)


def _one_tier(size: int, kind: str, nbytes: float, link: Link, tier: TierRates) -> float:
    """A collective among `size` devices that are linked alike."""
    rates = tier.collective(kind)
    times = _VOLUME[kind]
    moved = times * nbytes * (size - 1) / size
    rounds = times * math.ceil(math.log2(size))
    return rounds * rates.latency + moved / (link.bandwidth * rates.efficiency)


def _flat(line: _Line, kind: str, nbytes: float, inside: TierRates, across: TierRates) -> float:
    """Every device exchanges its parts with all others directly, near and far at once."""
    times, n, k = _VOLUME[kind], line.size, line.together
    near, far = inside.collective(kind), across.collective(kind)
    near_s = times * nbytes * (k - 1) / n / (line.inside.bandwidth * near.efficiency)
    far_s = times * nbytes * (n - k) / n / (line.across.bandwidth * far.efficiency)
    return times * math.ceil(math.log2(n)) * far.latency + max(near_s, far_s)
