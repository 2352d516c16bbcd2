"""The outer choices: replicas, microbatch sizes, mesh shapes, and where devices stand in line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raypar.errors import PlanError, did_you_mean
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import RECOMPUTE_POLICIES
from raypar.schedules.registry import schedule_names
from raypar.search.config import SearchConfig

MOST_MICROBATCHES = 4096
AXIS_NAMES = ("x", "y", "z")
"""Names of a stage's mesh axes besides the replicas'."""
MIXED_SLOTS = 16
"""Stages of unequal sizes are searched where so many of the smallest fill a replica's devices."""
MANY_UNLIKE = 16
"""Unequal devices, from which on integer programs of two axes are saved on."""


@dataclass(frozen=True)
class Split:
    """How the batch is cut.

    Attributes:
        replicas: D.
        microbatches: M.
        local_batch: Samples of one microbatch on one replica.
        devices: Devices of one replica.
    """

    replicas: int
    microbatches: int
    local_batch: int
    devices: int


def check_options(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> None:
    """Refuses options that no plan can have.

    Raises:
        PlanError: Names the option, what it may be, and a value that works.
    """
    if config.schedule != "auto" and config.schedule not in schedule_names():
        raise PlanError(
            f"train.schedule is {config.schedule!r}; valid are auto, "
            f"{', '.join(schedule_names())}.{did_you_mean(config.schedule, schedule_names())}"
        )
    if config.recompute not in ("auto", *RECOMPUTE_POLICIES):
        raise PlanError(
            f"search.recompute is {config.recompute!r}; valid are auto, "
            f"{', '.join(RECOMPUTE_POLICIES)}.{did_you_mean(config.recompute, RECOMPUTE_POLICIES)}"
        )
    if config.zero != "auto" and config.zero not in range(4):
        raise PlanError(f"search.zero is {config.zero!r}; valid are auto, 0, 1, 2, 3")
    if not 0 < config.memory_fraction <= 1:
        raise PlanError(
            f"search.memory_fraction is {config.memory_fraction}; it lies above 0 and at most at "
            "1, for example 0.9"
        )
    if config.chunks != 1:
        raise PlanError(
            f"search.chunks is {config.chunks}, but planner alpa gives every device one stage: "
            "leave it at 1, or set search.planner: uniform"
        )
    devices, most = cluster.n_devices, len(graph.cuts) + 1
    if config.tensor != "auto" and not 1 <= config.tensor <= devices:
        raise PlanError(
            f"search.tensor is {config.tensor}; the cluster has {devices} devices: take 1 to "
            f"{devices}"
        )
    stages = 1 if config.stages == "auto" else config.stages
    if not 1 <= stages <= most:
        raise PlanError(
            f"search.stages is {stages}, but the graph has {len(graph.cuts)} places to "
            f"cut: take 1 to {most} stages"
        )
    replicas = 1 if config.replicas == "auto" else config.replicas
    tensor = 1 if config.tensor == "auto" else config.tensor
    if stages * replicas * tensor > devices:
        raise PlanError(
            f"search.stages {stages} × search.replicas {replicas} × search.tensor {tensor} "
            f"need {stages * replicas * tensor} devices, the cluster has {devices}; lower "
            "one of them"
        )


def splits(graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Iterator[Split]:
    """Every way to cut the batch that the graph, the cluster and the options allow.

    Raises:
        PlanError: The options leave none.
    """
    total = cluster.n_devices
    count = 0
    for replicas in _replicas(graph, total, config):
        share = graph.global_batch // replicas
        for parts in _microbatches(graph, share, config):
            count += 1
            yield Split(replicas, parts, share // parts, total // replicas)
    if not count:
        raise PlanError(
            f"a global batch of {graph.global_batch} cannot be cut into search.replicas "
            f"{config.replicas} × train.microbatches {config.microbatches} equal parts; "
            f"microbatches=1 and replicas=1 always work"
        )


def _replicas(graph: OpGraph, devices: int, config: SearchConfig) -> list[int]:
    most = min(graph.max_replicas, devices)
    if config.replicas != "auto":
        wanted = config.replicas
        if wanted < 1 or wanted > devices:
            raise PlanError(
                f"search.replicas is {wanted}; the cluster has {devices} devices: take 1 to "
                f"{devices}"
            )
        if wanted > graph.max_replicas:
            op, reason = graph.analysis.blockers[0]
            raise PlanError(
                f"search.replicas is {wanted}, but samples meet at {op!r} ({reason}), so only "
                "search.replicas 1 trains exactly like the unsplit model"
            )
        return [wanted] if graph.global_batch % wanted == 0 else []
    return [d for d in range(1, most + 1) if graph.global_batch % d == 0 and _even(d, devices)]


def _even(part: int, devices: int) -> bool:
    """Whether `part` replicas leave at most an eighth of the devices idle."""
    return (devices // part) * part * 8 >= devices * 7


def _microbatches(graph: OpGraph, share: int, config: SearchConfig) -> list[int]:
    if config.microbatches != "auto":
        if config.microbatches < 1:
            raise PlanError(f"train.microbatches is {config.microbatches}; it is at least 1")
        return [config.microbatches] if share % config.microbatches == 0 else []
    if graph.feels_microbatches:
        return [1]  # M belongs to such a model's training recipe: only the user raises it
    sizes = [2**k for k in range(share.bit_length()) if share % 2**k == 0]
    sizes += [n for n in (3, 6, 12, 24, share) if share % n == 0 and n not in sizes and n <= share]
    return sorted({share // n for n in sizes if share // n <= MOST_MICROBATCHES})


def mesh_shapes(devices: int, per_node: int) -> list[tuple[int, ...]]:
    """Logical shapes of a stage's mesh of `devices` devices, one axis or two.

    Over several nodes the right axis stays inside a node.
    """
    if devices == 1:
        return [()]
    found: list[tuple[int, ...]] = [(devices,)]
    for right in range(2, min(devices // 2, per_node) + 1):
        if devices % right == 0 and (devices <= per_node or per_node % right == 0):
            found.append((devices // right, right))
    return found


def stage_sizes(devices: int, per_node: int, most: int = 16) -> list[int]:
    """Devices that a stage (of one replica) may have.

    Inside a node the powers of two and the whole node; beyond it whole nodes, as many as divide
    the nodes there are.
    """
    inside = [2**k for k in range(per_node.bit_length()) if 2**k <= min(per_node, devices)]
    if per_node <= devices:
        inside.append(per_node)
    nodes = devices // per_node if per_node else 0
    across = [n * per_node for n in range(2, nodes + 1) if nodes % n == 0 and n * per_node <= most]
    small = [devices] if devices < per_node else []
    return sorted({*inside, *across, *small})


def line_of_devices(cluster: Cluster) -> list[int]:
    """All devices in the order in which stages take them: node by node, equal kinds together.

    Those with most memory come first: under 1F1B the first stages hold the most microbatches.
    """
    kinds: dict[str, int] = {}
    for node in cluster.nodes:
        kinds.setdefault(node.device.name, len(kinds))

    def rank(i: int) -> tuple[int, int, int]:
        node = cluster.nodes[i]
        return -node.device_memory, kinds[node.device.name], i

    order = sorted(range(len(cluster.nodes)), key=rank)
    return [d for i in order for d in cluster.devices_of(i)]


def alike(cluster: Cluster) -> bool:
    """Whether all nodes are the same."""
    first = cluster.nodes[0]
    return all(
        (n.device, n.devices, n.inside, n.across, n.device_memory)
        == (first.device, first.devices, first.inside, first.across, first.device_memory)
        for n in cluster.nodes
    )
