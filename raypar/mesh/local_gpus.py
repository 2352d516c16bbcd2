"""The GPUs of this machine as a cluster, without Ray."""

from __future__ import annotations

import torch

from raypar.errors import ClusterError
from raypar.mesh._memory import machine_memory
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DeviceKind, device_kind

_OTHERS = {"PCIE", "NVL", "MIG"}
"""Words of forms that are slower than those of the device table."""


def local_gpus(n: int | None = None) -> Cluster:
    """`n` GPUs of this machine; default: all that torch sees.

    Raises:
        ClusterError: There are fewer, they are not alike, or the device table does not know them.
    """
    there = torch.cuda.device_count()
    count = there if n is None else n
    if not 1 <= count <= there:
        wanted = "GPUs" if n is None else f"{n} GPUs"
        raise ClusterError(
            f"{wanted} of this machine are to be measured, and torch {torch.__version__} sees "
            f"{there}: " + ("leave --gpu out" if there == 0 else f"give --local {there} or less")
        )
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    kind = gpu_kind(names.pop())
    if kind is None or names:
        found = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        raise ClusterError(
            f"this machine's GPUs ({found}) are not of one kind of the device table: start Ray, "
            "describe them in a cluster file under 'device_kinds', and run "
            "`raypar probe --address HOST:6379`"
        )
    return Cluster((Node.of(kind, count, name="local", host_memory=machine_memory()),), "local")


def gpu_kind(name: str) -> DeviceKind | None:
    """The device kind that a driver's name stands for; None: the table does not have it.

    Args:
        name: For example ``NVIDIA H100 80GB HBM3`` or ``NVIDIA A100-SXM4-80GB``.
    """
    words = name.removeprefix("NVIDIA ").replace("-", " ").split()
    if not words or _OTHERS & {word.upper() for word in words}:
        return None
    for known in (f"{words[0]}-{words[-1]}", words[0]):
        try:
            return device_kind(known)
        except ClusterError:
            continue
    return None
