"""What nodes told of themselves, and what is to be said of it: pure, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar._plan_text import count_of
from raypar.comm.network import SECTION
from raypar.doctor.finding import FAIL, OK, WARN, Finding
from raypar.mesh.skew import Software, disagreements

_GIB = 2**30
_SHM_ENOUGH = _GIB
_CLOCK_WARN_S = 0.5
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
    findings = [Finding("equal versions", OK, f"{said} on {count_of(len(nodes), 'node')}")]
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
