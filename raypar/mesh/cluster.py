"""The cluster as a value: which nodes hold which devices, and how they are linked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from raypar._yaml import parse_yaml
from raypar.errors import ClusterError, ConfigError
from raypar.mesh._memory import machine_memory
from raypar.mesh._schema import parse
from raypar.mesh.devices import DEVICES, GIB, DeviceKind, Link, device_kind

SAME_DEVICE = Link(float("inf"), 0.0, "same device")


@dataclass(frozen=True)
class Node:
    """One machine of a cluster.

    Attributes:
        name: What people call it (host name or address).
        device: Kind of its devices; all devices of a node are of one kind.
        devices: How many devices it has.
        host_memory: Bytes of main memory.
        inside: Link between two of its devices.
        across: Link of one of its devices to another node.
        id: Ray's node id (hex), or empty where the cluster does not come from Ray.
    """

    name: str
    device: DeviceKind
    devices: int
    host_memory: int
    inside: Link
    across: Link
    id: str = ""

    @property
    def device_memory(self) -> int:
        """Bytes that one device may fill: its own memory, or a CPU core's share of the host's."""
        return self.device.memory or self.host_memory // self.devices

    @classmethod
    def of(
        cls,
        device: DeviceKind | str,
        devices: int,
        *,
        name: str = "node0",
        host_memory: int | None = None,
        inside: Link | None = None,
        across: Link | None = None,
        id: str = "",
    ) -> Node:
        """A node whose links, unless given, are those of the device table.

        Args:
            device: A device kind or its name.
            devices: How many, at least 1.
            name: The node's name.
            host_memory: Bytes of main memory; by default twice what its GPUs hold, or 4 GiB for
                every CPU core.
            inside: Link between two of its devices.
            across: Link of one device to another node.
            id: Ray's node id.

        Raises:
            ClusterError: The device is unknown, or a number is not positive.
        """
        kind = device_kind(device) if isinstance(device, str) else device
        _positive("devices", devices, f"node {name!r}", 1)
        if host_memory is None:
            host_memory = devices * (2 * kind.memory or 4 * GIB)
        _positive("host_memory", host_memory, f"node {name!r}", 4 * GIB)
        return cls(
            name, kind, devices, host_memory, inside or kind.inside, across or kind.across, id
        )


@dataclass(frozen=True)
class Cluster:
    """Nodes in a fixed order; devices are numbered through, node after node.

    Attributes:
        nodes: At least one.
        name: For messages and file names.
    """

    nodes: tuple[Node, ...]
    name: str = "cluster"

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ClusterError(
                f"cluster {self.name!r} has no nodes with devices: give at least one under 'nodes'"
            )
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ClusterError(
                f"cluster {self.name!r}: two nodes are called {twice[0]!r}; "
                "give every node its own 'name'"
            )

    # -- ways to get one ---------------------------------------------------------------------

    @classmethod
    def local(cls, n: int | None = None) -> Cluster:
        """`n` CPU devices in this one machine (default: its cores)."""
        count = (os.cpu_count() or 1) if n is None else n
        _positive("n", count, "Cluster.local", 4)
        node = Node.of("CPU", count, name="local", host_memory=machine_memory())
        return cls((node,), "local")

    @classmethod
    def virtual(
        cls,
        nodes: int = 8,
        devices_per_node: int = 8,
        device: DeviceKind | str = "H100",
        *,
        host_memory: int | None = None,
        inside: Link | None = None,
        across: Link | None = None,
        name: str = "virtual",
    ) -> Cluster:
        """A cluster that need not exist, to plan for.

        Args:
            nodes: Number of nodes.
            devices_per_node: Devices on each.
            device: Device kind or its name in the table.
            host_memory: Bytes of main memory of a node.
            inside: Link inside a node, where it differs from the table's.
            across: Link between nodes, where it differs from the table's.
            name: The cluster's name.

        Raises:
            ClusterError: The device is unknown, or a number is not positive.
        """
        _positive("nodes", nodes, "Cluster.virtual", 8)
        _positive("devices_per_node", devices_per_node, "Cluster.virtual", 8)
        return cls(
            tuple(
                Node.of(
                    device,
                    devices_per_node,
                    name=f"node{i}",
                    host_memory=host_memory,
                    inside=inside,
                    across=across,
                )
                for i in range(nodes)
            ),
            name,
        )

    @classmethod
    def from_ray(
        cls,
        address: str | None = None,
        *,
        device: str = "auto",
        device_kinds: Mapping[str, DeviceKind] | None = None,
    ) -> Cluster:
        """The Ray cluster at `address`, or the one this process is connected to.

        Without `address` and connection, RAY_ADDRESS and then a Ray running on this machine are
        tried, and where there is none a local one is started, as every Ray library does.

        Args:
            address: ``host:port`` of the head, ``ray://host:port``, ``auto`` or ``local``.
            device: ``GPU``, ``CPU``, or ``auto``: GPUs if any node has some, else CPU cores.
            device_kinds: Kinds for accelerators that the table lacks, by Ray's accelerator name.

        Raises:
            ClusterError: It is not reachable (told within seconds), or has no such devices.
        """
        from raypar.mesh.discover import discover

        nodes, name = discover(address, device, device_kinds)
        return cls(nodes, name)

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Reads a cluster file (YAML).

        Raises:
            ClusterError: There is no such file, it is no YAML, or a key or value is wrong.
        """
        try:
            raw = parse_yaml(Path(path).read_text(encoding="utf-8"), f"cluster file {str(path)!r}")
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"cannot read cluster file {str(path)!r}: {error}") from None
        except ConfigError as error:
            raise ClusterError(str(error)) from None
        return cls.from_dict(raw, where=f"cluster file {str(path)!r}")

    @classmethod
    def from_dict(cls, raw: Any, *, where: str = "cluster") -> Cluster:
        """Builds what `to_dict` took apart; `where` begins the error messages.

        Raises:
            ClusterError: A key or value is wrong.
        """
        form = parse(raw, where)
        own = form.kinds(where)
        nodes: list[Node] = []
        for i, item in enumerate(form.nodes):
            try:
                kind = own.get(item.device) or device_kind(item.device)
            except ClusterError as error:
                raise ClusterError(f"{where}: nodes[{i}].device: {error}") from None
            kind = kind.at_speed(item.speed)
            for copy in range(item.count):
                base = item.name or f"node{len(nodes)}"
                nodes.append(
                    Node(
                        name=f"{base}-{copy}" if item.name and item.count > 1 else base,
                        device=kind,
                        devices=item.devices,
                        host_memory=item.host_memory,
                        inside=item.inside.value() if item.inside else kind.inside,
                        across=item.across.value() if item.across else kind.across,
                        id=item.id,
                    )
                )
        return cls(tuple(nodes), form.name)

    # -- ways to put one away ----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` gives back an equal cluster."""
        result: dict[str, Any] = {"name": self.name, "nodes": []}
        own = {n.device.name: n.device for n in self.nodes if not _in_table(n.device)}
        for node in self.nodes:
            entry: dict[str, Any] = {
                "name": node.name,
                "device": node.device.name,
                "devices": node.devices,
                "host_memory": node.host_memory,
                "inside": dataclasses.asdict(node.inside),
                "across": dataclasses.asdict(node.across),
            }
            if node.id:
                entry["id"] = node.id
            result["nodes"].append(entry)
        if own:
            result["device_kinds"] = {
                name: {k: v for k, v in dataclasses.asdict(kind).items() if k != "name"}
                for name, kind in own.items()
            }
        return result

    def save(self, path: str | Path) -> None:
        """Writes the YAML form; `load` gives back an equal cluster."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    # -- what it is like ---------------------------------------------------------------------

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Devices per node, in node order."""
        return tuple(node.devices for node in self.nodes)

    @cached_property
    def n_devices(self) -> int:
        """Number of devices of all nodes."""
        return sum(self.shape)

    @cached_property
    def kind(self) -> str:
        """Name of the device kind; several are joined by ``+`` in node order."""
        return "+".join(dict.fromkeys(node.device.name for node in self.nodes))

    @cached_property
    def homogeneous(self) -> bool:
        """Whether all nodes are alike but for name and id."""
        return len({dataclasses.replace(node, name="", id="") for node in self.nodes}) == 1

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        return tuple((i, j) for i, node in enumerate(self.nodes) for j in range(node.devices))

    def device(self, i: int) -> tuple[int, int]:
        """(node index, index within the node) of device `i`.

        Raises:
            ClusterError: There is no such device.
        """
        if not 0 <= i < self.n_devices:
            raise ClusterError(
                f"device {i} is not in cluster {self.name!r}: it has {self.n_devices} devices "
                f"(0 to {self.n_devices - 1}; per node {self.shape})"
            )
        return self._places[i]

    def node_of(self, i: int) -> Node:
        """The node that holds device `i`."""
        return self.nodes[self.device(i)[0]]

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """Of every node its first device."""
        return tuple(itertools.accumulate(self.shape[:-1], initial=0))

    def devices_of(self, node: int) -> range:
        """Cluster-wide indices of a node's devices."""
        first = self._firsts[node]
        return range(first, first + self.nodes[node].devices)

    def memory(self, i: int) -> int:
        """Bytes that device `i` may fill."""
        return self.node_of(i).device_memory

    def link(self, i: int, j: int) -> Link:
        """The link between devices `i` and `j`; the slower end's between two nodes."""
        if i == j:
            return SAME_DEVICE
        a, b = self.node_of(i), self.node_of(j)
        if a is b:
            return a.inside
        slow = min(a.across, b.across, key=lambda link: link.bandwidth)
        return dataclasses.replace(slow, latency=max(a.across.latency, b.across.latency))

    def fingerprint(self) -> str:
        """16 hex digits that equal hardware shares; measurements are filed under it.

        Made from kinds, counts, links and host memory in whole GiB; not from names and ids.
        """
        rows = [
            _floats(
                [
                    dataclasses.asdict(n.device),
                    n.devices,
                    round(n.host_memory / GIB),
                    dataclasses.asdict(n.inside),
                    dataclasses.asdict(n.across),
                ]
            )
            for n in self.nodes
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def take(self, shape: tuple[int, ...]) -> Cluster:
        """The part of this cluster that a plan made for `shape` (devices per node) uses.

        A node that is large enough stays in its place; otherwise the largest demand gets the
        smallest free node that holds it, which finds an assignment whenever there is one.

        Raises:
            ClusterError: Some node of the plan finds no node here.
        """
        if not shape or min(shape) < 1:
            raise ClusterError(f"cluster shape {shape} must hold positive numbers of devices")
        chosen = _assign(shape, self.shape)
        if chosen is None:
            raise ClusterError(
                f"the plan needs nodes with {list(shape)} devices; cluster {self.name!r} has "
                f"{list(self.shape)} ({self.kind}). Plan again for this cluster, or change "
                f"mesh.num_workers to at most {self.n_devices}"
            )
        nodes = tuple(
            dataclasses.replace(self.nodes[at], devices=need)
            # A CPU core's memory is its share of the node's: keep the share.
            if self.nodes[at].device.memory
            else dataclasses.replace(
                self.nodes[at],
                devices=need,
                host_memory=self.nodes[at].device_memory * need,
            )
            for need, at in zip(shape, chosen, strict=True)
        )
        return Cluster(nodes, self.name)

    def describe(self) -> str:
        """One line: ``2 nodes x 8 H100 (85.9 GB each)``."""
        if self.homogeneous:
            node = self.nodes[0]
            count = len(self.nodes)
            nodes = f"{count} nodes x " if count > 1 else "1 node x "
            return f"{nodes}{node.devices} {self.kind} ({node.device_memory / 1e9:.1f} GB each)"
        return ", ".join(f"{n.name}: {n.devices} {n.device.name}" for n in self.nodes)


def _floats(value: Any) -> Any:
    """The same value with every number as a float: 10**9 and 1e9 must hash alike."""
    if isinstance(value, Mapping):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) else value


def _in_table(kind: DeviceKind) -> bool:
    return DEVICES.get(kind.name) == kind


def _positive(key: str, value: Any, where: str, example: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClusterError(
            f"{where}: {key} must be a whole number of at least 1, found {value!r}; "
            f"for example {key}={example}"
        )


def _assign(need: tuple[int, ...], have: tuple[int, ...]) -> list[int] | None:
    """For every demand a different node that is large enough, or None."""
    if len(need) > len(have):
        return None
    if all(n <= h for n, h in zip(need, have, strict=False)):
        return list(range(len(need)))
    chosen = [-1] * len(need)
    free = set(range(len(have)))
    for i in sorted(range(len(need)), key=lambda i: -need[i]):
        fitting = [at for at in free if have[at] >= need[i]]
        if not fitting:
            return None
        chosen[i] = min(fitting, key=lambda at: (have[at], at))
        free.remove(chosen[i])
    return chosen
