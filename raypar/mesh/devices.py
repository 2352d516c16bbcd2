"""The built-in device table: what one device of a kind can do at best.

Figures are vendor maxima, per device, for dense matrices (without structured sparsity), one
direction for links. A cost model multiplies them with a measured efficiency; they are not what a
program reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raypar.errors import ClusterError, did_you_mean

GB = 10**9
GIB = 2**30
TERA = 1e12

DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8")
"""Number formats that the table knows; ``tf32`` is float32 data on matrix units."""

AT_SPEED = "@"
"""Between the name of a device kind and the share of its speed that some node's devices reach."""

_WIDER = {
    "float8": "float16",
    "bfloat16": "float32",
    "float16": "float32",
    "tf32": "float32",
    "float32": "float64",
}


@dataclass(frozen=True, slots=True)
class Link:
    """One way between two devices.

    Attributes:
        bandwidth: Bytes per second in one direction that one device gets.
        latency: Seconds for an empty message.
        name: What it is (``NVLink 4``, ``PCIe 5.0 x16``, ...), for messages.
    """

    bandwidth: float
    latency: float
    name: str = ""

    def seconds(self, size: float) -> float:
        """Time of one message of `size` bytes, in seconds: latency plus size over bandwidth."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class DeviceKind:
    """What one device of a kind can do.

    Attributes:
        name: Key of the table, as plans and files write it.
        vendor: ``nvidia`` or ``cpu``.
        flops: dtype → peak matrix-multiplication rate in FLOP/s (one multiply-add is two).
        memory: Bytes of device memory; 0 for a CPU core, whose memory belongs to its node.
        bandwidth: Memory bandwidth in bytes per second.
        inside: Link to another device of the same node.
        host: Link between the device and its node's memory.
        across: Link to a device of another node.
        source: Where the figures come from.
    """

    name: str
    vendor: str
    flops: Mapping[str, float] = field(hash=False)
    memory: int
    bandwidth: float
    inside: Link
    host: Link
    across: Link
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether Ray counts it as ``GPU`` (else as ``CPU``)."""
        return self.vendor != "cpu"

    def at_speed(self, share: float) -> DeviceKind:
        """This kind where it computes and moves memory at a share of its rates; links stay.

        It is a kind of its own, called ``KIND@SHARE``: plans and calibrations tell it apart.
        """
        if share == 1.0:
            return self
        return replace(
            self,
            name=f"{self.name}{AT_SPEED}{share:g}",
            flops={dtype: rate * share for dtype, rate in self.flops.items()},
            bandwidth=self.bandwidth * share,
            source=f"{self.source}; at {share:g} of its speed",
        )

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s for `dtype` (``float32`` or ``torch.float32``).

        A format that the device lacks runs at the rate of the next wider one that it has, as
        software emulation does.

        Raises:
            ClusterError: `dtype` is not one of `DTYPES`.
        """
        name = dtype.removeprefix("torch.")
        name = "float8" if name.startswith("float8") else name
        if name not in DTYPES:
            raise ClusterError(
                f"device {self.name!r}: no peak rate for dtype {dtype!r}; known are "
                f"{', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}"
            )
        while name not in self.flops and name in _WIDER:
            name = _WIDER[name]
        if name not in self.flops:
            raise ClusterError(
                f"device {self.name!r} lists no rate for {dtype!r} nor for a wider format "
                f"(it has {', '.join(self.flops)}): add 'float32' to its flops"
            )
        return self.flops[name]


def _gpu(
    name: str,
    *,
    tflops: dict[str, float],
    memory_gb: float,
    bandwidth_gbs: float,
    inside: Link,
    pcie: Link,
    nic_gbs: float,
    source: str,
) -> DeviceKind:
    return DeviceKind(
        name=name,
        vendor="nvidia",
        flops={dtype: rate * TERA for dtype, rate in tflops.items()},
        memory=int(memory_gb * GB),
        bandwidth=bandwidth_gbs * GB,
        inside=inside,
        host=pcie,
        across=Link(nic_gbs * GB, 5e-6, f"{nic_gbs * 8:g} Gb/s network"),
        source=source,
    )


def _nvlink(generation: int, gbs: float) -> Link:
    return Link(gbs * GB, 3e-6, f"NVLink {generation}")


def _pcie(generation: int, gbs: float) -> Link:
    return Link(gbs * GB, 5e-6, f"PCIe {generation}.0 x16")


_H100_TFLOPS = {
    "float64": 67.0,
    "float32": 67.0,
    "tf32": 494.7,
    "bfloat16": 989.4,
    "float16": 989.4,
    "float8": 1978.9,
}

# Datasheets give NVLink and PCIe rates of both directions together: halved here. Matrix rates that
# a datasheet gives with sparsity are halved too. The network share of one GPU is that of the
# vendor's own eight-GPU machine (network ports of the node over its GPUs).
_ROWS = (
    _gpu(
        "V100",
        # 16 GB, the smaller of the two versions, so that a plan fits both.
        tflops={"float64": 7.8, "float32": 15.7, "float16": 125.0},
        memory_gb=16,
        bandwidth_gbs=900,
        inside=_nvlink(2, 150),
        pcie=_pcie(3, 16),
        nic_gbs=6.25,
        source="NVIDIA V100 Tensor Core GPU datasheet (SXM2, 16 GB); network: NVIDIA DGX-1 "
        "datasheet, 4 x 100 Gb/s for 8 GPUs",
    ),
    _gpu(
        "A100-40",
        tflops={
            "float64": 19.5,
            "float32": 19.5,
            "tf32": 156.0,
            "bfloat16": 312.0,
            "float16": 312.0,
        },
        memory_gb=40,
        bandwidth_gbs=1555,
        inside=_nvlink(3, 300),
        pcie=_pcie(4, 32),
        nic_gbs=25,
        source="NVIDIA A100 Tensor Core GPU datasheet (SXM4 40 GB); network: NVIDIA DGX A100 "
        "datasheet, 8 x 200 Gb/s",
    ),
    _gpu(
        "A100-80",
        tflops={
            "float64": 19.5,
            "float32": 19.5,
            "tf32": 156.0,
            "bfloat16": 312.0,
            "float16": 312.0,
        },
        memory_gb=80,
        bandwidth_gbs=2039,
        inside=_nvlink(3, 300),
        pcie=_pcie(4, 32),
        nic_gbs=25,
        source="NVIDIA A100 Tensor Core GPU datasheet (SXM4 80 GB); network: NVIDIA DGX A100 "
        "datasheet, 8 x 200 Gb/s",
    ),
    _gpu(
        "H100",
        tflops=_H100_TFLOPS,
        memory_gb=80,
        bandwidth_gbs=3350,
        inside=_nvlink(4, 450),
        pcie=_pcie(5, 64),
        nic_gbs=50,
        source="NVIDIA H100 Tensor Core GPU datasheet (SXM5, dense); network: NVIDIA DGX H100 "
        "datasheet, 8 x 400 Gb/s",
    ),
    _gpu(
        "H200",
        tflops=_H100_TFLOPS,
        memory_gb=141,
        bandwidth_gbs=4800,
        inside=_nvlink(4, 450),
        pcie=_pcie(5, 64),
        nic_gbs=50,
        source="NVIDIA H200 Tensor Core GPU datasheet (SXM, dense); network: NVIDIA DGX H200 "
        "datasheet, 8 x 400 Gb/s",
    ),
    _gpu(
        "B200",
        tflops={
            "float64": 37.0,
            "float32": 75.0,
            "tf32": 1125.0,
            "bfloat16": 2250.0,
            "float16": 2250.0,
            "float8": 4500.0,
        },
        memory_gb=180,
        bandwidth_gbs=8000,
        inside=_nvlink(5, 900),
        pcie=_pcie(5, 64),
        nic_gbs=50,
        source="NVIDIA DGX B200 and HGX B200 datasheets (an eighth of the node, dense); network: "
        "8 x 400 Gb/s",
    ),
    _gpu(
        "L4",
        tflops={
            "float64": 0.47,
            "float32": 30.3,
            "tf32": 60.0,
            "bfloat16": 121.0,
            "float16": 121.0,
            "float8": 242.5,
        },
        memory_gb=24,
        bandwidth_gbs=300,
        inside=_pcie(4, 32),
        pcie=_pcie(4, 32),
        nic_gbs=1.5625,
        source="NVIDIA L4 Tensor Core GPU datasheet (dense); network: Google Cloud G2 machine "
        "types, 100 Gb/s for 8 GPUs",
    ),
    DeviceKind(
        name="CPU",
        vendor="cpu",
        flops={"float64": 40e9, "float32": 80e9, "bfloat16": 80e9, "float16": 80e9},
        memory=0,
        bandwidth=10 * GB,
        inside=Link(2.7 * GB, 50e-6, "loopback"),
        host=Link(10 * GB, 1e-6, "same memory"),
        across=Link(1.25 * GB, 100e-6, "10 Gb/s network"),
        source="one core at 2.5 GHz with two 256-bit FMA ports: Intel 64 and IA-32 Architectures "
        "Optimization Reference Manual; loopback: measured with gloo, 64 MB messages",
    ),
)

DEVICES: Mapping[str, DeviceKind] = {row.name: row for row in _ROWS}
"""Name → device kind."""

_ALIASES = {
    # What Ray's accelerator_type resource and label say.
    "A100": "A100-40",
    "A100-40G": "A100-40",
    "A100-80G": "A100-80",
    "A100-40GB": "A100-40",
    "A100-80GB": "A100-80",
    "CPU CORE": "CPU",
}


def device_kind(name: str) -> DeviceKind:
    """The table row called `name`, whatever its case; Ray's accelerator names work too.

    Raises:
        ClusterError: There is none; the text lists all and proposes the nearest.
    """
    wanted = name.strip().upper().removeprefix("NVIDIA-").removeprefix("TESLA-")
    wanted = _ALIASES.get(wanted, wanted)
    for key, row in DEVICES.items():
        if key.upper() == wanted:
            return row
    raise ClusterError(
        f"unknown device {name!r}; the table has {', '.join(DEVICES)}."
        f"{did_you_mean(wanted, DEVICES)} A device of another kind is described in a cluster file "
        "under 'device_kinds'"
    )
