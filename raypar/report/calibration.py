"""A calibration in words."""

from __future__ import annotations

from raypar.mesh.calibration import Calibration, DeviceRates, TierRates
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import DeviceKind, Link


def calibration_text(calibration: Calibration, cluster: Cluster) -> str:
    """What devices and links of a cluster reach, one line for each constant.

    Args:
        calibration: What was measured.
        cluster: The cluster whose maxima it refers to.
    """
    kinds = {node.device.name: node.device for node in cluster.nodes}
    lines = [calibration.note]
    for kind in kinds.values():
        lines += _device(kind, calibration.rates(kind))
    first = cluster.nodes[0]
    if max(cluster.shape) > 1:
        lines += _tier("inside a node", calibration.inside, first.inside)
    if len(cluster.nodes) > 1:
        lines += _tier("across nodes", calibration.across, first.across)
    return "\n".join(lines)


def _device(kind: DeviceKind, rates: DeviceRates) -> list[str]:
    lines = [f"{kind.name}: {1e6 * rates.overhead:.1f} us per op"]
    for name, curve in rates.matmul.items():
        dtype, _, form = name.partition("/")
        rate = curve.top * kind.peak(dtype)
        half = f", half of it at {curve.half / 1e6:.3g} MFLOP" if curve.half else ""
        lines.append(f"  {form or 'matmul':<20} {dtype:<9} {rate / 1e9:8.1f} GFLOP/s{half}")
    for name, memory in rates.memory.items():
        far = f", {memory.far / 1e9:.1f} beyond {memory.knee / 1e6:.2g} MB"
        lines.append(
            f"  {name:<30} {memory.near / 1e9:8.1f} GB/s{far if memory.far != memory.near else ''}"
        )
    return lines


def _tier(title: str, tier: TierRates, link: Link) -> list[str]:
    rows = {"point to point": tier.p2p, **tier.collectives}
    return [
        f"{title}:",
        *(
            f"  {name:<30} {r.efficiency * link.bandwidth / 1e9:8.2f} GB/s  "
            f"{1e6 * r.latency:7.1f} us"
            for name, r in rows.items()
        ),
    ]
