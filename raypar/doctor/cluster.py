"""Every node of a Ray cluster: versions, devices, space, clocks, and whether they reach each other.

One small actor looks on each node, pinned to it and without a claim on its CPUs, so that a busy
cluster can be examined, too. Its code travels with it: a node without raypar is a finding. What
nodes told is judged in `nodes.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raypar.comm.network import SECTION, NetworkSettings
from raypar.doctor.finding import FAIL, WARN, Finding
from raypar.doctor.nodes import (
    NodeFacts,
    Unreached,
    judge_clocks,
    judge_machines,
    judge_ports,
    judge_software,
)
from raypar.errors import ClusterError
from raypar.mesh import _node_facts
from raypar.mesh.skew import Software, by_value, pinned

REPORT_FORMAT = 1
_CLOCK_ASKS = 5
_DIAL_S = 3.0


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
