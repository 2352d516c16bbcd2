"""Rows of published throughputs: what was trained on what, and how fast, in one form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DeviceKind, Link, device_kind
from release._megatron import Shape

VOCABULARY, SEQUENCE = 51200, 2048
HEAD_SIZES = (96, 128)
"""Sizes of an attention head that are tried where a table does not give the heads."""
MOST_MICROBATCH = 16


@dataclass(frozen=True)
class Row:
    """One published measurement.

    Attributes:
        name: For people.
        layers: Of the GPT.
        hidden: Its width.
        heads: Attention heads; None: not published.
        data: Replicas.
        tensor: Devices that share every layer.
        pipeline: Rank groups.
        batch: Sequences of a step.
        devices: In all.
        interleaves: Whether more than one stage per device is possible.
        tflops: Published TFLOP/s per device, if that is the unit.
        rate: Published sequences per second, if that is the unit.
    """

    name: str
    layers: int
    hidden: int
    heads: int | None
    data: int
    tensor: int
    pipeline: int
    batch: int
    devices: int
    interleaves: bool
    tflops: float | None
    rate: float | None
    sequence: int = SEQUENCE
    vocabulary: int = VOCABULARY

    @property
    def flops(self) -> float:
        """FLOPs of a step with recomputed activations (Narayanan et al. 2021, equation 3)."""
        s, width, depth = self.sequence, self.hidden, self.layers
        extra = 1 + s / (6 * width) + self.vocabulary / (16 * depth * width)
        return 96 * self.batch * s * depth * width**2 * extra

    @property
    def published_s(self) -> float:
        """Published seconds of a step."""
        if self.tflops is not None:
            return self.flops / (self.devices * self.tflops * 1e12)
        assert self.rate is not None
        return self.batch / self.rate

    @property
    def unit(self) -> str:
        """Name of the published figure."""
        return "tflops_per_device" if self.tflops is not None else "sequences_per_s"

    @property
    def published(self) -> float:
        """The published figure."""
        figure = self.tflops if self.tflops is not None else self.rate
        assert figure is not None
        return figure

    def figure(self, step_s: float) -> float:
        """A step time in the published unit."""
        if self.tflops is not None:
            return self.flops / (self.devices * step_s * 1e12)
        return self.batch / step_s


def read_rows(table: Mapping[str, Any]) -> list[Row]:
    """The rows of one table.

    Raises:
        ValueError: A row gives neither TFLOP/s nor sequences per second, or its numbers do not
            divide.
    """
    return [_row(raw, table) for raw in table["rows"]]


def _row(raw: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    tensor, pipeline = int(raw["tensor_parallel"]), int(raw["pipeline_parallel"])
    data = raw.get("data_parallel") or int(raw["devices"]) // (tensor * pipeline)
    devices = int(raw.get("devices", data * tensor * pipeline))
    if data * tensor * pipeline != devices or raw["global_batch"] % data:
        raise ValueError(
            f"{data} replicas × {tensor} × {pipeline} stages are not {devices} devices, or do not "
            f"divide a batch of {raw['global_batch']}: {dict(raw)}"
        )
    tflops, rate = raw.get("tflops_per_device"), raw.get("sequences_per_s")
    if tflops is None and rate is None:
        raise ValueError(f"no tflops_per_device and no sequences_per_s in {dict(raw)}")
    label = raw.get("case") or f"{raw.get('params_billion', '?')}B"
    return Row(
        f"{label} {data}x{tensor}x{pipeline} l{raw['layers']} h{raw['hidden']}",
        int(raw["layers"]), int(raw["hidden"]), raw.get("heads"), data, tensor, pipeline,
        int(raw["global_batch"]), devices, "interleave" in table or "interleave" in raw,
        tflops, rate,
        int(raw.get("sequence", SEQUENCE)), int(raw.get("vocabulary", VOCABULARY)),
    )  # fmt: skip


def head_counts(row: Row) -> list[int]:
    """Numbers of heads that may have been used."""
    if row.heads is not None:
        return [row.heads]
    counts = [row.hidden // size for size in HEAD_SIZES if row.hidden % size == 0]
    fitting = [n for n in counts if n % row.tensor == 0]
    return (
        fitting
        or [
            n
            for n in range(row.tensor, row.hidden + 1, row.tensor)
            if row.hidden % n == 0 and row.hidden // n <= max(HEAD_SIZES)
        ][:1]
    )


def shapes(row: Row) -> Iterator[tuple[int, Shape]]:
    """(sequences of a microbatch, shape): every way to cut the batch and to interleave."""
    share = row.batch // row.data
    for size in (2**k for k in range(MOST_MICROBATCH.bit_length())):
        if share % size:
            continue
        count = share // size
        most = row.layers // row.pipeline if row.interleaves and row.pipeline > 1 else 1
        for chunks in range(1, most + 1):
            if row.layers % (row.pipeline * chunks):
                continue
            if chunks > 1 and count % row.pipeline:
                continue
            yield size, Shape(row.data, row.tensor, row.pipeline, chunks, count)


def device_name(table: Mapping[str, Any]) -> str:
    """Family of the table's device, as calibrations are filed: ``A100``, ``V100``."""
    return str(table["hardware"]["device"]).split("-")[0].split(" ")[0]


def cluster_of(table: Mapping[str, Any], devices: int) -> Cluster:
    """The table's cluster with at least so many devices.

    A port to other nodes that the devices of a node share is dealt out to them evenly.
    """
    hardware = table["hardware"]
    per_node = int(hardware["devices_per_node"])
    across = hardware.get("inter_node_bytes_per_s_per_device")
    if across is None:
        across = hardware["inter_node_bytes_per_s_per_node"] / per_node
    name = device_name(table)
    known = device_kind(name)
    kind = DeviceKind(
        name=name,
        vendor=known.vendor,
        flops={**known.flops, "float16": float(hardware["peak_flops_per_s"])},
        memory=int(hardware["memory_bytes"]),
        bandwidth=float(hardware["hbm_bytes_per_s"]),
        inside=Link(float(hardware["intra_node_bytes_per_s"]), known.inside.latency),
        host=known.host,
        across=Link(float(across), known.across.latency),
        source="published table",
    )
    nodes = math.ceil(devices / per_node)
    return Cluster(
        tuple(
            Node(f"node{i}", kind, per_node, 500 * 10**9, kind.inside, kind.across)
            for i in range(nodes)
        )
    )
