"""Profiled layer graphs: every layer with its costs at each tensor-parallel degree.

The format of the inputs published with Tarnawski et al. 2021, "Piper: Multidimensional Planner for
DNN Parallelization" (NeurIPS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raypar.errors import PlanError
from raypar.graph._workloads_json import (
    check_edges,
    checked_number,
    listed,
    node_id,
    number,
)
from raypar.graph._workloads_json import field as get


@dataclass(frozen=True)
class LayerVariant:
    """One way to run a layer at one tensor-parallel degree.

    Attributes:
        name: ``vanilla``, ``activation recomp``, ….
        seconds: Forward and backward of one microbatch, on each device of the stage.
        parameter_bytes: Parameters on one device, summed up between replicas.
        bytes_per_flight: Memory for every microbatch in flight.
        bytes_always: Memory besides.
        sync_forward: Predecessor → bytes that are sent inside the stage for its value on top.
        sync_backward: Successor → the same for its gradient.
    """

    name: str
    seconds: float
    parameter_bytes: float
    bytes_per_flight: float
    bytes_always: float
    sync_forward: Mapping[int, float] = field(default_factory=dict)
    sync_backward: Mapping[int, float] = field(default_factory=dict)

    @property
    def recomputes(self) -> bool:
        """Whether it makes its activations again in the backward pass."""
        return "recomp" in self.name.lower()


@dataclass(frozen=True)
class Layer:
    """A node of a layer graph.

    Attributes:
        id: Its id.
        name: What it is.
        variants: Tensor-parallel degree → ways to run it; degrees may be missing.
    """

    id: int
    name: str
    variants: Mapping[int, tuple[LayerVariant, ...]]


@dataclass(frozen=True)
class LayerEdge:
    """A value that one layer makes and another reads.

    Attributes:
        source: Id of the layer that makes it.
        target: Id of the layer that reads it.
        nbytes: Its size.
    """

    source: int
    target: int
    nbytes: float


@dataclass(frozen=True)
class LayerWorkload:
    """A model as an acyclic graph of layers with profiled costs.

    Attributes:
        layers: In the order of the file.
        edges: Values between them.
        devices: Devices that the file suggests, if it does.
        memory: Bytes of one device, likewise.
        bandwidth: Bytes per second between devices, likewise.
        microbatches: Microbatches of a step, likewise.
    """

    layers: tuple[Layer, ...]
    edges: tuple[LayerEdge, ...]
    devices: int | None = None
    memory: float | None = None
    bandwidth: float | None = None
    microbatches: int | None = None

    def __post_init__(self) -> None:
        check_edges([n.id for n in self.layers], [(e.source, e.target) for e in self.edges])

    @property
    def degrees(self) -> tuple[int, ...]:
        """Every tensor-parallel degree that some layer can run at, ascending."""
        return tuple(sorted({t for layer in self.layers for t in layer.variants}))


def is_layer_workload(raw: Mapping[str, Any]) -> bool:
    """Whether a file's object is of this format."""
    nodes = raw.get("nodes")
    return isinstance(nodes, list) and any(isinstance(n, dict) and "TMPCs" in n for n in nodes)


def parse_layer_workload(raw: Mapping[str, Any]) -> LayerWorkload:
    """Reads the object of a file.

    Raises:
        PlanError: Something is missing, unknown, negative or given twice, or there is a cycle.
    """
    layers = tuple(_layer(n, f"nodes[{i}]") for i, n in enumerate(listed(raw, "nodes", "workload")))
    edges = tuple(
        LayerEdge(
            node_id(e, "sourceId", f"edges[{i}]"),
            node_id(e, "destId", f"edges[{i}]"),
            number(e, "communicationCost", f"edges[{i}]"),
        )
        for i, e in enumerate(listed(raw, "edges", "workload"))
    )
    ids = {layer.id for layer in layers}
    for layer in layers:
        for degree, variants in layer.variants.items():
            for variant in variants:
                for other in (*variant.sync_forward, *variant.sync_backward):
                    if other not in ids:
                        raise PlanError(
                            f"node {layer.id}, TMPCs.{degree}, {variant.name!r}: a sync time names "
                            f"node {other}, which is not there"
                        )
    return LayerWorkload(
        layers,
        edges,
        devices=_whole(raw, "maxDevices"),
        memory=_positive(raw, "maxMemoryPerDevice"),
        bandwidth=_positive(raw, "bandwidth"),
        microbatches=_whole(raw, "mbsInBatch"),
    )


def _layer(raw: Any, where: str) -> Layer:
    one = node_id(raw, "id", where)
    where = f"node {one}"
    tables = get(raw, "TMPCs", where)
    if not isinstance(tables, dict) or not tables:
        raise PlanError(
            f"{where}.TMPCs: expected an object of degrees → variants, with one or more"
        )
    variants: dict[int, tuple[LayerVariant, ...]] = {}
    for text in tables:
        if not text.isdecimal() or int(text) < 1:
            raise PlanError(f"{where}.TMPCs: {text!r} is no tensor-parallel degree (1, 2, 4, …)")
        found = listed(tables, text, f"{where}.TMPCs")
        if not found:
            raise PlanError(f"{where}.TMPCs.{text} is empty; give it a variant or leave it out")
        variants[int(text)] = tuple(
            _variant(v, f"{where}.TMPCs.{text}[{i}]") for i, v in enumerate(found)
        )
    return Layer(one, str(raw.get("name", one)), variants)


def _variant(raw: Any, where: str) -> LayerVariant:
    return LayerVariant(
        str(get(raw, "id", where)),
        number(raw, "timePerSample", where),
        number(raw, "parameterSize", where),
        number(raw, "memoryUsageA", where),
        number(raw, "memoryUsageB", where),
        _syncs(raw, "syncTimeFw", where),
        _syncs(raw, "syncTimeBw", where),
    )


def _syncs(raw: Any, key: str, where: str) -> dict[int, float]:
    found = get(raw, key, where)
    if not isinstance(found, dict):
        raise PlanError(f"{where}.{key} is {found!r:.80}; it must be an object of ids → bytes")
    result: dict[int, float] = {}
    for text, value in found.items():
        if not text.isdecimal():
            raise PlanError(f"{where}.{key}: {text!r} is no node id")
        result[int(text)] = checked_number(value, f"{where}.{key}.{text}")
    return result


def _positive(raw: Mapping[str, Any], key: str) -> float | None:
    if raw.get(key) is None:
        return None
    value = number(raw, key, "workload")
    if value <= 0:
        raise PlanError(f"workload.{key} is {value}; it must be more than 0")
    return value


def _whole(raw: Mapping[str, Any], key: str) -> int | None:
    value = _positive(raw, key)
    if value is not None and not value.is_integer():
        raise PlanError(f"workload.{key} is {value}; it must be a whole number")
    return None if value is None else int(value)
