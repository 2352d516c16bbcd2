"""The plan as bands: one for every rank group, with a box for every stage that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from raypar._plan_html import hue
from raypar._plan_text import duration, mesh_text, size, span
from raypar.fit import stage_ranges
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report._stages import axis_forms, collective_words, layers_text, parameters_text
from raypar.report._words import percent
from raypar.report.page._words import MEMORY
from raypar.search.cost.base import StageCost, total_s
from raypar.search.simulation import LaneReport, MemoryTimeline, Simulation

_LEAST_FULL = 0.08
"""Share of a device's memory below which a bar of it would not show its parts."""


@dataclass(frozen=True, slots=True)
class StageBox:
    """One stage.

    Attributes:
        index: Its number in graph order.
        chunk: Which of its rank group's stages it is.
        layers: Names of its layers, folded.
        ends: First and last op.
        mesh: Its mesh in words.
        shardings: (axis, what ops are cut over it) for every axis.
        parameters: How much of its parameters a rank holds, where it is not all.
        recompute: Policy.
        zero: ZeRO level.
        forward: Predicted time of one microbatch's forward pass, collectives included.
        backward: The same for its backward pass.
        seconds: Both together, in seconds.
        talk: Time of collectives in both, or empty.
        collectives: Collectives of both, in words.
        saved: Bytes kept from a forward to its backward, per microbatch.
    """

    index: int
    chunk: int
    layers: str
    ends: tuple[str, str]
    mesh: str
    shardings: list[tuple[str, list[str]]]
    parameters: str
    recompute: str
    zero: int
    forward: str
    backward: str
    seconds: float
    talk: str
    collectives: str
    saved: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a memory bar or of a bar of time: its style class, share, and hover text."""

    style: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class Band:
    """One rank group.

    Attributes:
        group: Its number.
        hue: Of its colour, in degrees.
        devices: Its devices, in words.
        nodes: The nodes that hold them.
        boxes: Its stages.
        memory: What a rank holds at its peak, as parts of the whole bar.
        peak: Bytes of that, in words.
        limit: Bytes that its devices hold, in words.
        full: Peak as a share of the limit.
        filled: The same in words.
        limit_at: Where on the bar the limit is; 0 where the bar would be too short to be read
            against it, and is as long as the peak.
        time: Compute, communication and idle shares of the step.
        idle: The last of them.
        note: Which replica is shown, where they differ.
    """

    group: int
    hue: float
    devices: str
    nodes: str
    boxes: list[StageBox]
    memory: list[Part]
    peak: str
    limit: str
    full: float
    filled: str
    limit_at: float
    time: list[Part]
    idle: float
    note: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node on the map of devices: (hue or None where idle, how many devices, hover text)."""

    name: str
    cells: list[tuple[float | None, int, str]]


def bands(
    plan: Plan, graph: OpGraph, cluster: Cluster, lowered: LoweredPlan, played: Simulation
) -> list[Band]:
    """A band for every rank group.

    Args:
        plan: The plan.
        graph: The graph it is for.
        cluster: The cluster it is for.
        lowered: The lowered plan.
        played: Its simulated step.
    """
    boxes = _boxes(plan, graph, lowered, played.setting.costs)
    lanes: dict[int, list[tuple[LaneReport, MemoryTimeline]]] = {}
    for lane, memory in zip(played.lanes, played.memory, strict=True):
        lanes.setdefault(lane.group, []).append((lane, memory))
    found = []
    for group, own in sorted(lanes.items()):
        lane, memory = max(own, key=lambda pair: pair[1].peak_bytes / pair[0].memory_limit)
        stages = [s for s, (g, _) in enumerate(plan.schedule.placement) if g == group]
        devices = plan.stages[stages[0]].mesh.devices
        full = memory.peak_bytes / lane.memory_limit
        seen = full >= _LEAST_FULL
        whole = max(memory.peak_bytes, lane.memory_limit) if seen else memory.peak_bytes
        found.append(
            Band(
                group=group,
                hue=hue(group),
                devices=f"device{'s' * (len(devices) > 1)} {span(devices)}",
                nodes=_nodes(cluster, devices),
                boxes=[boxes[s] for s in stages],
                memory=_memory_parts(memory.peak_parts, whole),
                peak=size(memory.peak_bytes),
                limit=size(lane.memory_limit),
                full=full,
                filled=percent(full),
                limit_at=lane.memory_limit / whole if seen else 0.0,
                time=_time_parts(lane),
                idle=lane.idle,
                note="" if len(own) == 1 else f"replica {lane.replica}, the fullest of {len(own)}",
            )
        )
    return found


def device_map(plan: Plan, cluster: Cluster) -> list[NodeRow]:
    """For every node which rank groups its devices belong to, neighbours together."""
    group_of = {
        d: group
        for stage, (group, _) in zip(plan.stages, plan.schedule.placement, strict=True)
        for d in stage.mesh.devices
    }
    rows = []
    for i, node in enumerate(cluster.nodes):
        cells: list[tuple[float | None, int, str]] = []
        for group, run in groupby(cluster.devices_of(i), key=group_of.get):
            devices = tuple(run)
            words = "idle" if group is None else f"rank group {group}"
            text = f"{node.name} ({node.device.name}): devices {span(devices)}: {words}"
            cells.append((None if group is None else hue(group), len(devices), text))
        rows.append(NodeRow(node.name, cells))
    return rows


def _boxes(
    plan: Plan, graph: OpGraph, lowered: LoweredPlan, costs: Sequence[StageCost]
) -> list[StageBox]:
    found = []
    for s, (first, end) in enumerate(stage_ranges(plan, graph)):
        stage, cost = plan.stages[s], costs[s]
        talk = (*cost.forward_comm, *cost.backward_comm)
        forward = cost.forward_s + total_s(cost.forward_comm)
        backward = cost.backward_s + total_s(cost.backward_comm)
        found.append(
            StageBox(
                index=s,
                chunk=plan.schedule.placement[s][1],
                layers=layers_text(graph, first, end),
                ends=(stage.first, stage.last),
                mesh=mesh_text(stage.mesh),
                shardings=axis_forms(plan, graph, lowered, s),
                parameters=parameters_text(plan, lowered, s),
                recompute=stage.memory.recompute,
                zero=stage.memory.zero,
                forward=duration(forward),
                backward=duration(backward),
                seconds=forward + backward,
                talk=duration(total_s(talk)) if talk else "",
                collectives=", ".join(collective_words(talk)),
                saved=size(cost.saved_bytes),
            )
        )
    return found


def _memory_parts(parts: Mapping[str, int], whole: int) -> list[Part]:
    ordered = [k for k in MEMORY if parts.get(k)] + [k for k in parts if k not in MEMORY]
    return [
        Part(
            f"m-{key}",
            parts[key] / whole,
            f"{MEMORY.get(key, (key, ''))[0]}: {size(parts[key])} of each device "
            f"({MEMORY.get(key, ('', key))[1]})",
        )
        for key in ordered
        if parts[key]
    ]


def _time_parts(lane: LaneReport) -> list[Part]:
    shares = (
        ("k-F", lane.compute, "computing"),
        ("k-comm", lane.communication, "in collectives, or waiting for what is under way"),
        ("k-wait", lane.idle, "idle: waiting for somebody who has not sent yet"),
    )
    return [Part(k, share, f"{share:.1%} of the step {text}") for k, share, text in shares if share]


def _nodes(cluster: Cluster, devices: Sequence[int]) -> str:
    names = list(dict.fromkeys(cluster.node_of(d).name for d in devices))
    kinds = "+".join(dict.fromkeys(cluster.node_of(d).device.name for d in devices))
    shown = (
        ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]} ({len(names)} nodes)"
    )
    return f"{kinds} on {shown}"
