"""Every node of a Ray cluster: versions, devices, space, clocks, and whether they reach each other.

One small actor looks on each node, pinned to it and without a claim on its CPUs, so that a busy
cluster can be examined, too. Its code travels with it: a node without raypar is a finding.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raypar.comm.network import SECTION, NetworkSettings
from raypar.doctor.finding import FAIL, OK, WARN, Finding
from raypar.errors import ClusterError
from raypar.mesh import _node_facts
from raypar.mesh.skew import Software, by_value, disagreements, pinned

REPORT_FORMAT = 1
_GIB = 2**30
_SHM_ENOUGH = _GIB
_CLOCK_WARN_S = 0.5
_CLOCK_ASKS = 5
_DIAL_S = 3.0
_MOST_NODES_NAMED = 6


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What one node told of itself.

    Attributes:
        node_id: Ray's node id (hex).
        address: By which Ray knows the node.
        host: Its host name.
        software: Versions.
        cores: CPU cores that its Ray may use, or None.
        gpus: Names of its GPUs.
        driver: NVIDIA driver version, or empty.
        driver_cuda: Newest CUDA (major, minor) that the driver runs, or None.
        torch_cuda: CUDA that torch was built for, or None.
        nccl: Version of the installed NCCL package, or None.
        shm_free: Free bytes of /dev/shm, or None.
        source: Digest of raypar's source there, or None.
        clock_s: Its clock minus this machine's, in seconds.
        clock_within_s: How exactly that is known: half a round trip.
        listens_at: The address on which its ranks would listen.
    """

    node_id: str
    address: str
    host: str
    software: Software
    cores: int | None
    gpus: tuple[str, ...]
    driver: str
    driver_cuda: tuple[int, int] | None
    torch_cuda: str | None
    nccl: str | None
    shm_free: int | None
    source: str | None
    clock_s: float = 0.0
    clock_within_s: float = 0.0
    listens_at: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} ({self.address})"


@dataclass(frozen=True, slots=True)
class Unreached:
    """A port of one node that another could not reach.

    Attributes:
        source: Address of the node that dialled.
        target: Address that it dialled.
        port: Port.
        why: What the system said.
    """

    source: str
    target: str
    port: int
    why: str


@dataclass(frozen=True)
class ClusterReport:
    """What `examine` found.

    Attributes:
        nodes: Every node that answered, in Ray's order.
        findings: What was judged, worst news included; see `raypar.doctor.render`.
        unreached: Every pair and port that failed.
    """

    nodes: tuple[NodeFacts, ...]
    findings: tuple[Finding, ...]
    unreached: tuple[Unreached, ...] = field(default=())

    def to_json(self) -> str:
        """The report as JSON text, for machines."""
        return json.dumps({"format": REPORT_FORMAT, **dataclasses.asdict(self)}, indent=1)


def examine(
    interface: str | None = None,
    port_range: tuple[int, int] | None = None,
    deadline_s: float = 60.0,
) -> ClusterReport:
    """Looks at every node of the Ray cluster that this process is connected to.

    Args:
        interface: ``comm.interface`` of the runs to come.
        port_range: ``comm.port_range``: its first, middle and last port are tried between
            all pairs of nodes; None tries any free port.
        deadline_s: Seconds that the slowest node may take for each part.

    Raises:
        ClusterError: This process is not connected to Ray, or no node is alive.
        ConfigError: `interface` or `port_range` cannot be meant.
    """
    import ray

    if not ray.is_initialized():
        raise ClusterError("connect to the cluster first: ray.init(address='HOST:6379')")
    network = NetworkSettings(interface, port_range)
    records = {r["NodeID"]: r for r in ray.nodes() if r["Alive"]}
    if not records:
        raise ClusterError("the Ray cluster has no alive node; look at `ray status`")
    make: Any = ray.remote(by_value(_node_facts.NodeProbe))
    actors = {
        i: make.options(num_cpus=0, max_restarts=0, scheduling_strategy=pinned(i)).remote()
        for i in records
    }
    try:
        return _examined(actors, records, network, deadline_s)
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _examined(
    actors: dict[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    network: NetworkSettings,
    deadline_s: float,
) -> ClusterReport:
    told, findings = _answers({i: a.look.remote() for i, a in actors.items()}, records, deadline_s)
    actors = {i: actors[i] for i in told}
    nodes = {i: _facts(i, records[i]["NodeManagerAddress"], found) for i, found in told.items()}
    for i, (offset, within) in _clocks(actors, deadline_s).items():
        nodes[i] = dataclasses.replace(nodes[i], clock_s=offset, clock_within_s=within)
    ports, at, port_findings = _open(actors, nodes, network, records, deadline_s)
    nodes = {i: dataclasses.replace(node, listens_at=at.get(i, "")) for i, node in nodes.items()}
    unreached = _dial(actors, ports, at, nodes, deadline_s)
    every = tuple(nodes.values())
    findings = [
        *findings,
        *judge_software(every),
        *judge_machines(every),
        *judge_clocks(every),
        *port_findings,
    ]
    if len(ports) == len(nodes):  # else what is wrong has been told
        findings.append(judge_ports(len(ports), unreached))
    return ClusterReport(every, tuple(findings), tuple(unreached))


def _answers(
    calls: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], deadline_s: float
) -> tuple[dict[str, Any], list[Finding]]:
    """What each node answered, and a finding for each that did not."""
    import ray

    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=deadline_s)
    told: dict[str, Any] = {}
    findings: list[Finding] = []
    for node_id, call in calls.items():
        name = f"node {records[node_id]['NodeManagerAddress']}"
        if call not in ready:
            findings.append(
                Finding(
                    name,
                    FAIL,
                    f"no answer within {deadline_s:g} s",
                    "look at `ray status` and the node's load, or take it out of the cluster",
                )
            )
            continue
        try:
            told[node_id] = ray.get(call)
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            findings.append(
                Finding(name, FAIL, f"cannot run an actor: {last}", "look at the node's Ray logs")
            )
    return told, findings


def _facts(node_id: str, address: str, found: Mapping[str, Any]) -> NodeFacts:
    cuda = found["driver_cuda"]
    return NodeFacts(
        node_id=node_id,
        address=address,
        host=found["host"],
        software=Software.of(f"{found['host']} ({address})", found),
        cores=found["cores"],
        gpus=tuple(found["gpus"]),
        driver=found["driver"][0] if found["driver"] else "",
        driver_cuda=None if cuda is None else (cuda[0], cuda[1]),
        torch_cuda=found["torch_cuda"],
        nccl=found["nccl"],
        shm_free=found["shm_free"],
        source=found["source"],
    )


# -- clocks and ports: what nodes have to be asked together -------------------------------------


def _clocks(actors: Mapping[str, Any], deadline_s: float) -> dict[str, tuple[float, float]]:
    """Offset of each node's clock by the quickest of a few round trips (Cristian 1989)."""
    import ray

    found: dict[str, tuple[float, float]] = {}
    end = time.monotonic() + deadline_s
    for node_id, actor in actors.items():
        for _ in range(_CLOCK_ASKS):
            asked = time.time()
            try:
                theirs = ray.get(actor.now.remote(), timeout=max(0.1, end - time.monotonic()))
            except (ray.exceptions.RayError, TimeoutError):
                break
            half = (time.time() - asked) / 2
            if node_id not in found or half < found[node_id][1]:
                found[node_id] = (theirs - (asked + half), half)
    return found


def _open(
    actors: Mapping[str, Any],
    nodes: Mapping[str, NodeFacts],
    network: NetworkSettings,
    records: Mapping[str, Mapping[str, Any]],
    deadline_s: float,
) -> tuple[dict[str, list[int]], dict[str, str], list[Finding]]:
    """Has every node listen; returns its ports, its address, and what did not work."""
    wanted = [0]
    if network.port_range is not None:
        first, last = network.port_range
        wanted = sorted({first, (first + last) // 2, last})
    opening = {
        i: a.open.remote(nodes[i].address, network.interface, wanted) for i, a in actors.items()
    }
    told, findings = _answers(opening, records, deadline_s)
    ports: dict[str, list[int]] = {}
    at: dict[str, str] = {}
    for i, (host, opened, problem) in told.items():
        at[i] = host
        if opened:
            ports[i] = opened
        if problem:
            mend = f"choose another {SECTION}.interface or port_range, or end what holds the port"
            findings.append(
                Finding(f"network of {nodes[i].name}", WARN if opened else FAIL, problem, mend)
            )
    return ports, at, findings


def _dial(
    actors: Mapping[str, Any],
    ports: Mapping[str, Sequence[int]],
    at: Mapping[str, str],
    nodes: Mapping[str, NodeFacts],
    deadline_s: float,
) -> list[Unreached]:
    """Has every node dial every port of every other one."""
    import ray

    targets = {
        source: [(at[i], port) for i, opened in ports.items() if i != source for port in opened]
        for source in actors
    }
    calls = {i: a.dial.remote(targets[i], _DIAL_S) for i, a in actors.items() if targets[i]}
    found: list[Unreached] = []
    end = time.monotonic() + deadline_s
    for source, call in calls.items():
        try:
            said = ray.get(call, timeout=max(0.1, end - time.monotonic()))
        except (ray.exceptions.RayError, TimeoutError) as error:
            said = [str(error).strip().splitlines()[0]] * len(targets[source])
        for (host, port), why in zip(targets[source], said, strict=True):
            if why:
                found.append(Unreached(nodes[source].address, host, port, why))
    return found


# -- judgements: pure, of facts ---------------------------------------------------------------


def judge_software(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Equal versions; raypar's code, too, where its version number is equal."""
    lacking = [n.name for n in nodes if n.software.raypar is None]
    if lacking:
        mend = (
            "pip install raypar there, or bring it with runtime_env (pip=['raypar==...'], or the "
            "wheel in py_modules)"
        )
        return [Finding("raypar on every node", FAIL, f"missing on {_some(lacking)}", mend)]
    problems = disagreements(n.software for n in nodes)
    if problems:
        mend = "install the same versions on every node, or bring them with runtime_env"
        return [Finding("equal versions", FAIL, problem, mend) for problem in problems]
    first = nodes[0].software
    said = ", ".join(f"{k} {getattr(first, k)}" for k in ("python", "torch", "ray", "raypar"))
    findings = [Finding("equal versions", OK, f"{said} on {len(nodes)} nodes")]
    sources: dict[str, list[str]] = {}
    for node in nodes:
        sources.setdefault(node.source or "unknown", []).append(node.name)
    if len(sources) > 1:
        shown = "; ".join(f"{source} on {_some(names)}" for source, names in sources.items())
        mend = "install the same wheel on every node"
        findings.append(
            Finding("raypar's code", WARN, f"one version, but different files: {shown}", mend)
        )
    return findings


def judge_machines(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Devices, /dev/shm, and whether drivers run what torch and NCCL were built for."""
    findings: list[Finding] = []
    for node in nodes:
        shown = f"{node.cores or '?'} cores; " + (", ".join(node.gpus) or "no GPU")
        findings.append(Finding(f"devices of {node.name}", OK, shown))
        if node.shm_free is not None:
            findings.append(_shm(node.name, node.shm_free))
        if node.gpus:
            findings.append(_driver(node))
    with_gpus = [n for n in nodes if n.gpus]
    versions = {n.nccl for n in with_gpus}
    if len(versions) > 1:
        shown = ", ".join(f"{n.nccl or 'none'} on {n.name}" for n in with_gpus)
        mend = "install the same nvidia-nccl package on every GPU node: NCCL refuses to mix them"
        findings.append(Finding("NCCL", FAIL, shown, mend))
    elif with_gpus:
        findings.append(Finding("NCCL", OK, f"{versions.pop()} on {len(with_gpus)} GPU nodes"))
    return findings


def _shm(name: str, free: int) -> Finding:
    found = f"{free / _GIB:.1f} GiB free"
    if free >= _SHM_ENOUGH:
        return Finding(f"/dev/shm of {name}", OK, found)
    mend = "start its container with --shm-size=2g or more (Ray's objects live there)"
    less = f"{found}, less than {_SHM_ENOUGH / _GIB:.0f} GiB"
    return Finding(f"/dev/shm of {name}", WARN, less, mend)


def _driver(node: NodeFacts) -> Finding:
    name = f"driver of {node.name}"
    if node.torch_cuda is None:
        mend = "install a torch that is built for CUDA there"
        return Finding(name, FAIL, "it has GPUs, but torch is built without CUDA", mend)
    if node.driver_cuda is None:
        mend = "look at nvidia-smi there; in a container, start it with the NVIDIA runtime"
        return Finding(name, FAIL, "it has GPUs, but libcuda.so.1 does not load", mend)
    major, minor = node.driver_cuda
    wanted = tuple(int(part) for part in node.torch_cuda.split(".")[:2])
    shown = f"driver {node.driver} runs CUDA {major}.{minor}; torch is built for {node.torch_cuda}"
    if major < wanted[0]:
        mend = f"update the driver to one for CUDA {node.torch_cuda}, or install an older torch"
        return Finding(name, FAIL, shown, mend)
    if (major, minor) < wanted:
        # Since CUDA 11 a driver runs what was built for a later minor of its major.
        mend = f"if kernels are missing, update the driver to one for CUDA {node.torch_cuda}"
        return Finding(name, WARN, f"{shown} (minor versions are compatible)", mend)
    return Finding(name, OK, shown)


def judge_clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Clocks that differ make logs and traces of several nodes unreadable."""
    off = [n for n in nodes if abs(n.clock_s) - n.clock_within_s > _CLOCK_WARN_S]
    if off:
        mend = "run NTP (chrony or systemd-timesyncd) on every node"
        shown = ", ".join(f"{n.name} {n.clock_s:+.2f} s" for n in off[:_MOST_NODES_NAMED])
        return [Finding("clocks", WARN, f"against this machine: {shown}", mend)]
    most = max((abs(n.clock_s) + n.clock_within_s for n in nodes), default=0.0)
    return [Finding("clocks", OK, f"within {max(1.0, most * 1e3):.0f} ms of this machine's")]


def judge_ports(listening: int, unreached: Sequence[Unreached]) -> Finding:
    """Whether every node reached every other one."""
    if unreached:
        shown = "; ".join(
            f"{u.source} → {u.target}:{u.port}: {u.why}" for u in unreached[:_MOST_NODES_NAMED]
        )
        more = len(unreached) - _MOST_NODES_NAMED
        mend = (
            f"open TCP between the nodes (firewall, security group) for {SECTION}.port_range, "
            f"or choose another {SECTION}.interface"
        )
        text = f"{len(unreached)} connections failed: {shown}" + (
            f"; and {more} more" if more > 0 else ""
        )
        return Finding("ports between nodes", FAIL, text, mend)
    if listening < 2:
        return Finding("ports between nodes", OK, "one node: nothing to connect")
    return Finding("ports between nodes", OK, f"all pairs of {listening} nodes connect both ways")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NODES_NAMED])
    more = len(names) - _MOST_NODES_NAMED
    return shown + (f" and {more} more" if more > 0 else "")
