"""From a running Ray cluster to a list of nodes. Ray is imported inside the functions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from raypar.compat_ray import ray_address_on_this_machine, ray_node_on_this_machine
from raypar.errors import ClusterError
from raypar.mesh._memory import machine_memory
from raypar.mesh._probe import probe, split_address
from raypar.mesh.cluster import Node
from raypar.mesh.devices import GIB, DeviceKind, device_kind

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR_RESOURCE = "accelerator_type:"
_HEAD_RESOURCE = "node:__internal_head__"
_NODE_S = 10  # Ray itself waits a minute for a node on this machine
_HEAD_S = 10.0  # a head that is busy answers late; one that is gone is known at once


def discover(
    address: str | None = None,
    device: str = "auto",
    device_kinds: Mapping[str, DeviceKind] | None = None,
) -> tuple[tuple[Node, ...], str]:
    """Connects and reads the alive nodes; see `Cluster.from_ray`.

    Returns:
        The nodes, head first, and a name for the cluster.

    Raises:
        ClusterError: The cluster is not reachable, or holds no such devices.
    """
    import ray

    connect(address)
    found = nodes_from(ray.nodes(), device, device_kinds)
    return found, f"ray@{ray.get_runtime_context().gcs_address}"


def devices_now(device: str) -> int:
    """How many devices (``CPU`` or ``GPU``) the alive nodes of this process's cluster have."""
    import ray

    return sum(_count(record, device) for record in ray.nodes() if record["Alive"])


def connect(address: str | None = None) -> None:
    """Connects this process to Ray, unless it is connected.

    A dead address is refused within seconds; without an address, RAY_ADDRESS and a Ray on this
    machine are tried, and then a local one is started.

    Raises:
        ClusterError: It is not reachable, or this process is connected to another cluster.
    """
    import ray

    if ray.is_initialized():
        _check_same(address)
        return
    target = resolve(address)
    if target != "local":
        probe(target)
    if target != "local" and "://" not in target:
        _await_node(target)
    try:
        ray.init(address=target)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"Ray at {target} refused this process: {error}. Python and Ray versions must equal "
            "the cluster's (`raypar doctor` shows this machine's), and so must RAY_AUTH_MODE"
        ) from error


def lost_head() -> str:
    """Why the head of this process's cluster does not answer any more; empty where it does.

    Ray's own calls wait a minute for a head that is gone, and then end the process; for one that
    hangs they wait for ever.
    """
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return ""  # it is beyond a server, which tells by itself
    try:
        probe(ray.get_runtime_context().gcs_address, _HEAD_S)
    except ClusterError as error:
        return str(error)
    return ""


def _await_node(target: str) -> None:
    """A driver talks to a node on its own machine: without one, Ray tries for a minute.

    Raises:
        ClusterError: None of that cluster runs here.
    """
    if ray_node_on_this_machine(target, _NODE_S):
        return
    raise ClusterError(
        f"the head at {target} answers, but no node of its cluster runs on this machine, or the "
        f"one that did has died (looked for {_NODE_S} s). Start one here: `ray start "
        f"--address={target}`; or run on a node of the cluster: `raypar submit`; or unset "
        "RAY_ADDRESS to use this machine alone"
    )


def resolve(address: str | None) -> str:
    """The address that `connect` would use: ``host:port``, ``ray://...`` or ``local``."""
    if address == "local":
        return "local"
    if address not in (None, "", "auto"):
        return str(address)
    env = os.environ.get("RAY_ADDRESS", "")
    if env and env != "auto":
        return env
    running = ray_address_on_this_machine()
    if running is not None:
        try:
            probe(running, 1.0)
            return running
        except ClusterError:
            pass  # left behind by a Ray that has ended
    if address == "auto" or env == "auto":
        raise ClusterError(
            "address 'auto': no Ray runs on this machine. Start one with `ray start --head`, or "
            "leave the address out to have one started"
        )
    return "local"


def _check_same(address: str | None) -> None:
    import ray

    if address in (None, "", "auto", "local") or str(address).startswith("ray://"):
        return
    here = ray.get_runtime_context().gcs_address
    if split_address(str(address)) != split_address(here):
        raise ClusterError(
            f"asked for the Ray cluster at {address}, but this process is connected to {here}: "
            "call ray.shutdown() first, or leave the address out"
        )


def nodes_from(
    records: Iterable[Mapping[str, Any]],
    device: str = "auto",
    device_kinds: Mapping[str, DeviceKind] | None = None,
) -> tuple[Node, ...]:
    """Nodes out of what `ray.nodes()` returns: the alive ones that hold devices, head first.

    Args:
        records: The list that `ray.nodes()` returns.
        device: ``GPU``, ``CPU`` or ``auto``.
        device_kinds: Kinds for accelerators that the table lacks, by Ray's accelerator name;
            ``GPU`` stands for one without a name.

    Raises:
        ClusterError: No alive node has such a device, or its kind is unknown.
    """
    alive = [r for r in records if r.get("Alive", r.get("alive", False))]
    wanted = device.upper()
    if wanted not in ("AUTO", "GPU", "CPU"):
        raise ClusterError(f"device must be 'auto', 'GPU' or 'CPU', found {device!r}")
    if wanted == "AUTO":
        wanted = "GPU" if any(_count(r, "GPU") for r in alive) else "CPU"
    chosen = sorted((r for r in alive if _count(r, wanted)), key=_order)
    if not chosen:
        has = ", ".join(f"{r.get('NodeManagerHostname', '?')}: {_plain(r)}" for r in alive)
        raise ClusterError(
            f"no alive node of the Ray cluster has a {wanted} (it has {has or 'no alive node'}). "
            + (
                "Use device='CPU' (mesh.device=cpu)"
                if wanted == "GPU"
                else "Start a node with --num-cpus=1 or more"
            )
        )
    names = _names(chosen)
    return tuple(
        _node(r, wanted, name, device_kinds or {}) for r, name in zip(chosen, names, strict=True)
    )


def _node(record: Mapping[str, Any], wanted: str, name: str, own: Mapping[str, DeviceKind]) -> Node:
    count = _count(record, wanted)
    kind = device_kind("CPU") if wanted == "CPU" else _accelerator(record, name, own)
    memory = int(record["Resources"].get("memory", 0)) or min(machine_memory(), count * 4 * GIB)
    return Node.of(kind, count, name=name, host_memory=memory, id=record["NodeID"])


def _accelerator(record: Mapping[str, Any], name: str, own: Mapping[str, DeviceKind]) -> DeviceKind:
    said = record.get("Labels", {}).get(ACCELERATOR_LABEL, "")
    # Ray may offer a general and a more exact name ("A100", "A100-40G"): the longest is the best.
    resources = [
        key.removeprefix(_ACCELERATOR_RESOURCE)
        for key in record["Resources"]
        if key.startswith(_ACCELERATOR_RESOURCE)
    ]
    names = sorted({said, *resources} - {""}, key=lambda n: (-len(n), n)) or ["GPU"]
    for candidate in names:
        if candidate in own:
            return own[candidate]
    try:
        return device_kind(names[0])
    except ClusterError as error:
        raise ClusterError(
            f"node {name}: its GPUs are {names[0]!r} to Ray (label {ACCELERATOR_LABEL}): {error}; "
            f"or pass device_kinds={{{names[0]!r}: DeviceKind(...)}} to Cluster.from_ray"
        ) from None


def _count(record: Mapping[str, Any], resource: str) -> int:
    return int(record.get("Resources", {}).get(resource, 0))


def _order(record: Mapping[str, Any]) -> tuple[bool, str, str]:
    head = _HEAD_RESOURCE in record["Resources"]
    return (not head, record.get("NodeManagerAddress", ""), record["NodeID"])


def _names(records: list[Mapping[str, Any]]) -> list[str]:
    """Host names; several Ray nodes of one host get a number."""
    hosts = [r.get("NodeManagerHostname") or r.get("NodeManagerAddress", "node") for r in records]
    seen: Counter[str] = Counter()
    names = []
    for host in hosts:
        seen[host] += 1
        names.append(host if seen[host] == 1 else f"{host}#{seen[host]}")
    return names


def _plain(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.get("Resources", {}).items() if k in ("CPU", "GPU")}
