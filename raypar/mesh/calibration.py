"""What a cluster really reaches, as a few constants for each device kind and link tier.

Constants are fractions of the device table's maxima where they can be, so that one calibration
speaks for every cluster of the same devices and fabric. `raypar probe` measures them; without a
measurement `table_calibration` states the defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raypar.errors import ClusterError
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import AT_SPEED, DeviceKind

CALIBRATION_FORMAT = 1
INSIDE, ACROSS = "inside", "across"
COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_max")


@dataclass(frozen=True, slots=True)
class MatmulCurve:
    """Share of the peak rate that one matrix product of f FLOPs reaches: ``top * f / (f + half)``.

    Attributes:
        top: Share of the peak that very large products reach.
        half: FLOPs at which half of that is reached.
    """

    top: float
    half: float

    def seconds(self, flops: float, peak: float) -> float:
        """Time of `flops` FLOPs at a peak of `peak` FLOP/s."""
        return (flops + self.half) / (self.top * peak) if flops > 0 else 0.0


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Seconds to move bytes: one rate while they fit near the core, another beyond.

    Attributes:
        near: Bytes per second up to `knee` bytes.
        far: Bytes per second of what goes beyond.
        knee: Bytes of one op from which on memory is far; infinite where there is one rate.
    """

    near: float
    far: float
    knee: float = float("inf")

    def seconds(self, nbytes: float) -> float:
        """Time to read and write `nbytes` bytes in all."""
        if nbytes <= self.knee:
            return nbytes / self.near
        return self.knee / self.near + (nbytes - self.knee) / self.far


@dataclass(frozen=True)
class DeviceRates:
    """What a device of one kind reaches.

    Attributes:
        matmul: dtype, or ``dtype/form`` (``float32/conv``, ``float32/attention``), → efficiency of
            matrix products, relative to the table's peak of the dtype. A dtype that is missing is
            taken from ``float32``, then from any.
        memory: Class of element-wise op (``plain``, ``exp``, ``reduce``, ``gather``, ...) → how
            fast it moves its bytes. ``plain`` is always there and stands in for missing ones. A
            form of product (``conv``) that is listed here first brings its bytes into another
            order: that time adds to the products'.
        overhead: Seconds that any op costs besides.
        optimizer: How fast an optimizer step with two states goes through the bytes of the
            parameters (all passes included).
        optimizer_overhead: Seconds that every parameter tensor costs the optimizer besides.
        view_overhead: Seconds that an op costs that moves nothing.
    """

    matmul: Mapping[str, MatmulCurve] = field(hash=False)
    memory: Mapping[str, MemoryCurve] = field(hash=False)
    overhead: float
    optimizer: MemoryCurve
    optimizer_overhead: float = 0.0
    view_overhead: float = 0.0

    def curve(self, dtype: str, form: str = "") -> MatmulCurve:
        """Efficiency of matrix products of a dtype (``float32``) and form (``conv``)."""
        name = dtype.removeprefix("torch.")
        for key in (f"{name}/{form}", name, f"float32/{form}", "float32"):
            if key in self.matmul:
                return self.matmul[key]
        return next(iter(self.matmul.values()))

    def at_speed(self, share: float) -> DeviceRates:
        """The same at a share of the speed: products are relative to the kind's own peak."""

        def slower(curve: MemoryCurve) -> MemoryCurve:
            return replace(curve, near=curve.near * share, far=curve.far * share)

        return replace(
            self,
            matmul={
                name: replace(curve, half=curve.half * share) for name, curve in self.matmul.items()
            },
            memory={kind: slower(curve) for kind, curve in self.memory.items()},
            optimizer=slower(self.optimizer),
        )

    def bytes_curve(self, kind: str) -> MemoryCurve:
        """How fast a class of element-wise op moves bytes."""
        return self.memory.get(kind, self.memory["plain"])


@dataclass(frozen=True, slots=True)
class LinkRates:
    """How one kind of exchange uses a link.

    Attributes:
        latency: Seconds of one message (for a collective: of one of its rounds).
        efficiency: Share of the link's bandwidth that is reached.
    """

    latency: float
    efficiency: float


@dataclass(frozen=True)
class TierRates:
    """How messages use the links of one tier (inside a node, or across nodes).

    Attributes:
        p2p: Messages from one device to another.
        collectives: Kind of collective → the same; a missing kind is as `p2p`.
    """

    p2p: LinkRates
    collectives: Mapping[str, LinkRates] = field(default_factory=dict, hash=False)

    def collective(self, kind: str) -> LinkRates:
        """Rates of a collective."""
        found = self.collectives.get(kind)
        if found is None and kind == "all_max":
            found = self.collectives.get("all_reduce")
        return found or self.p2p


@dataclass(frozen=True)
class Calibration:
    """Measured (or default) constants of a cluster.

    Attributes:
        devices: Device kind → what it reaches.
        inside: Links between devices of one node.
        across: Links between nodes.
        measured: Whether they come from a measurement; False: from the device table.
        fingerprint: Of the cluster that was measured, or empty.
        note: Where they come from, for reports.
        format: Number of the JSON form.
    """

    devices: Mapping[str, DeviceRates] = field(hash=False)
    inside: TierRates
    across: TierRates
    measured: bool = False
    fingerprint: str = ""
    note: str = ""
    format: int = CALIBRATION_FORMAT

    def rates(self, kind: DeviceKind) -> DeviceRates:
        """What a device kind reaches; the defaults for its vendor where it was not measured.

        Devices of a slow node (`DeviceKind.at_speed`) reach their share of what was measured of
        their kind, unless they were measured themselves.
        """
        found = self.devices.get(kind.name)
        if found is None:
            name, slowed, share = kind.name.partition(AT_SPEED)
            whole = self.devices.get(name) if slowed else None
            found = whole.at_speed(float(share)) if whole else default_rates(kind)
        return found

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal value."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads what `to_json` wrote.

        Raises:
            ClusterError: The text is no calibration.
        """
        try:
            raw = json.loads(text)
            if raw.get("format") != CALIBRATION_FORMAT:
                raise ValueError(f"format {raw.get('format')!r}, expected {CALIBRATION_FORMAT}")
            return cls(
                {name: _device(item) for name, item in raw["devices"].items()},
                _tier(raw["inside"]),
                _tier(raw["across"]),
                bool(raw["measured"]),
                str(raw["fingerprint"]),
                str(raw["note"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ClusterError(
                f"this is no calibration ({reason}); `raypar probe` writes a new one"
            ) from None


def _plain(value: Any) -> Any:
    # JSON has no infinity: a knee that is never reached is written as null.
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if value == float("inf") else value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)


def _memory(raw: Mapping[str, Any]) -> MemoryCurve:
    knee = raw["knee"]
    return MemoryCurve(
        _positive(raw["near"]),
        _positive(raw["far"]),
        float("inf") if knee is None else _positive(knee),
    )


def _device(raw: Mapping[str, Any]) -> DeviceRates:
    matmul = {
        name: MatmulCurve(_positive(c["top"]), float(c["half"]))
        for name, c in raw["matmul"].items()
    }
    memory = {name: _memory(c) for name, c in raw["memory"].items()}
    if not matmul or "plain" not in memory:
        raise ValueError("a device needs a matmul curve and the memory class 'plain'")
    return DeviceRates(
        matmul,
        memory,
        float(raw["overhead"]),
        _memory(raw["optimizer"]),
        float(raw["optimizer_overhead"]),
        float(raw["view_overhead"]),
    )


def _link(raw: Mapping[str, Any]) -> LinkRates:
    return LinkRates(float(raw["latency"]), _positive(raw["efficiency"]))


def _tier(raw: Mapping[str, Any]) -> TierRates:
    return TierRates(
        _link(raw["p2p"]), {kind: _link(item) for kind, item in raw["collectives"].items()}
    )


# Without a measurement: what large dense layers usually reach of a vendor's maxima. One curve for
# all forms of product, one rate for all memory traffic.
_GPU_TOP, _GPU_HALF_S, _GPU_MEMORY, _GPU_OVERHEAD = 0.65, 6e-6, 0.8, 4e-6
_CPU_TOP, _CPU_HALF_S, _CPU_MEMORY, _CPU_OVERHEAD = 0.8, 4e-6, 0.6, 3e-6
_LINK_EFFICIENCY = 0.8
_OPTIMIZER_PASSES = 7
"""Adam reads parameter, gradient and two states and writes three of them."""


def default_rates(kind: DeviceKind) -> DeviceRates:
    """The stated defaults of a device kind that was not measured."""
    gpu = kind.is_gpu
    top = _GPU_TOP if gpu else _CPU_TOP
    half_s = _GPU_HALF_S if gpu else _CPU_HALF_S
    rate = kind.bandwidth * (_GPU_MEMORY if gpu else _CPU_MEMORY)
    curves = {dtype: MatmulCurve(top, half_s * peak * top) for dtype, peak in kind.flops.items()}
    step = rate / _OPTIMIZER_PASSES
    overhead = _GPU_OVERHEAD if gpu else _CPU_OVERHEAD
    views = 0.0 if gpu else overhead / 2  # a GPU is not told of them
    return DeviceRates(
        curves,
        {"plain": MemoryCurve(rate, rate)},
        overhead,
        MemoryCurve(step, step),
        view_overhead=views,
    )


def table_calibration(cluster: Cluster) -> Calibration:
    """The device table with stated default efficiencies: what is used without a measurement."""
    kinds = {node.device.name: node.device for node in cluster.nodes}

    def tier(latency: float) -> TierRates:
        return TierRates(LinkRates(latency, _LINK_EFFICIENCY))

    return Calibration(
        {name: default_rates(kind) for name, kind in kinds.items()},
        tier(max(node.inside.latency for node in cluster.nodes)),
        tier(max(node.across.latency for node in cluster.nodes)),
        note="uncalibrated: device table",
    )
