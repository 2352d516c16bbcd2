"""Published operator graphs with latencies, for device placement.

The JSON form of Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of DNN Graph
Operators" (NeurIPS): nodes with a latency on an accelerator and on a CPU, and edges whose cost is
the time that the source's output takes over the border of a device. The form calls every
accelerator an FPGA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypar.errors import PlanError
from raypar.graph._workloads_json import check_edges, field, listed, node_id, number

_COST_TOLERANCE = 1e-6
"""Costs of one node's outgoing edges are one tensor's: written differently, they differ by less."""


@dataclass(frozen=True, slots=True)
class PlacementNode:
    """An operator.

    Attributes:
        id: Its number in the file.
        name: For people.
        on_accelerator: Whether an accelerator can run it.
        accelerator_s: Latency on an accelerator, in the file's unit of time.
        cpu_s: Latency on a CPU, in the same unit.
        bytes: What it takes of an accelerator's memory.
        backward: Whether it belongs to the backward pass.
        colour: Nodes of one colour run on one device; None: free.
    """

    id: int
    name: str
    on_accelerator: bool
    accelerator_s: float
    cpu_s: float
    bytes: float
    backward: bool
    colour: int | None


@dataclass(frozen=True, slots=True)
class PlacementWorkload:
    """An operator graph and the devices it is to be placed on.

    Attributes:
        accelerators: Accelerators there are.
        cpus: CPUs there are.
        memory: Bytes of one accelerator; CPUs have no limit.
        nodes: In the file's order.
        edges: (source, target) as positions in `nodes`, each once.
        cost: For every node the time its output takes over the border of an accelerator; 0 where
            nothing reads it.
    """

    accelerators: int
    cpus: int
    memory: float
    nodes: tuple[PlacementNode, ...]
    edges: tuple[tuple[int, int], ...]
    cost: tuple[float, ...]


def is_placement_workload(raw: Mapping[str, Any]) -> bool:
    """Whether a file's JSON looks like an operator graph for device placement."""
    return bool({"maxFPGAs", "maxSizePerFPGA", "maxCPUs"} & set(raw))


def parse_placement_workload(raw: Mapping[str, Any]) -> PlacementWorkload:
    """Reads and checks the JSON of a file.

    Edges that are given twice (an operator that reads an input twice) count once.

    Raises:
        PlanError: A key is missing or of the wrong type, a number is negative or not finite, an
            edge leads to a node that is not there, edges of one node disagree about its cost, the
            graph has a cycle or leads from the backward to the forward pass, or no device can hold
            what belongs together.
    """
    nodes = tuple(_node(item, f"nodes[{i}]") for i, item in enumerate(listed(raw, "nodes", "file")))
    ends, cost = _edges(listed(raw, "edges", "file"))
    check_edges([node.id for node in nodes], ends)
    at = {node.id: i for i, node in enumerate(nodes)}
    for source, target in ends:
        if nodes[at[source]].backward and not nodes[at[target]].backward:
            raise PlanError(
                f"edge {source} → {target} leads from a node with isBackwardNode 1 to one of the "
                "forward pass, which reads nothing of the backward pass: correct isBackwardNode, "
                "or take the edge out"
            )
    work = PlacementWorkload(
        accelerators=_count(raw, "maxFPGAs"),
        cpus=_count(raw, "maxCPUs"),
        memory=number(raw, "maxSizePerFPGA", "file"),
        nodes=nodes,
        edges=tuple((at[source], at[target]) for source, target in ends),
        cost=tuple(cost.get(node.id, 0.0) for node in nodes),
    )
    check_devices(work)
    return work


def check_devices(work: PlacementWorkload) -> None:
    """Checks that there is a device for every set of co-located nodes.

    Raises:
        PlanError: There is none; says which nodes, and what to change.
    """
    if work.accelerators + work.cpus < 1:
        raise PlanError(
            "there are 0 accelerators (maxFPGAs) and 0 CPUs (maxCPUs); set maxFPGAs to 1 or more"
        )
    if work.cpus:
        return  # a CPU runs everything, and has no limit of memory
    groups: dict[tuple[str, int], list[PlacementNode]] = {}
    for node in work.nodes:
        key = ("node", node.id) if node.colour is None else ("colorClass", node.colour)
        groups.setdefault(key, []).append(node)
    for (kind, number_), members in groups.items():
        what = f"node {members[0].id}" if len(members) == 1 else f"the nodes of {kind} {number_}"
        foreign = [node.id for node in members if not node.on_accelerator]
        if foreign:
            raise PlanError(
                f"{what} cannot run anywhere: node {foreign[0]} has supportedOnFpga 0, and maxCPUs "
                "is 0; set maxCPUs to 1"
            )
        size = math.fsum(node.bytes for node in members)
        if size > work.memory:
            raise PlanError(
                f"{what} takes {size:.6g} bytes, an accelerator has maxSizePerFPGA "
                f"{work.memory:.6g}, and there is no CPU; set maxSizePerFPGA to {size:.6g} or "
                "more, or maxCPUs to 1"
            )


def _node(raw: Any, where: str) -> PlacementNode:
    ident = node_id(raw, "id", where)
    colour = None if raw.get("colorClass") is None else node_id(raw, "colorClass", where)
    return PlacementNode(
        id=ident,
        name=str(raw.get("name", f"node {ident}")),
        on_accelerator=_flag(raw, "supportedOnFpga", where),
        accelerator_s=number(raw, "fpgaLatency", where),
        cpu_s=number(raw, "cpuLatency", where),
        bytes=number(raw, "size", where),
        backward=_flag(raw, "isBackwardNode", where),
        colour=colour,
    )


def _edges(raw: Sequence[Any]) -> tuple[list[tuple[int, int]], dict[int, float]]:
    """(source id, target id) of every edge once, and the cost of every node that has readers."""
    ends: dict[tuple[int, int], None] = {}
    cost: dict[int, float] = {}
    for i, item in enumerate(raw):
        where = f"edges[{i}]"
        source, target = node_id(item, "sourceId", where), node_id(item, "destId", where)
        found = number(item, "cost", where)
        known = cost.setdefault(source, found)
        if abs(known - found) > _COST_TOLERANCE:
            raise PlanError(
                f"{where}.cost is {found}, another edge out of node {source} has {known}; all of "
                "them are the cost of its one output: make them equal"
            )
        ends[source, target] = None
    return list(ends), cost


def _flag(raw: Any, key: str, where: str) -> bool:
    value = field(raw, key, where)
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise PlanError(f"{where}.{key} is {value!r:.80}; it must be 0, 1, true or false")
    return bool(value)


def _count(raw: Any, key: str) -> int:
    value = node_id(raw, key, "file")
    if value < 0:
        raise PlanError(f"file.{key} is {value}; it must be at least 0")
    return value
