"""A quick stand-in for the simulator, for GPTs of equal layers: from one lowering of a few layers.

Five layers as four stages (embedding and a layer; a layer; two layers; a layer and the loss) tell
what an end and what one more layer cost; any depth, pipeline and microbatch size is put together
from them. What it says is only used to choose between plans and to fit constants; figures that are
reported come from the simulator, run on the whole model's instruction lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raypar.lowered import lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA
from raypar.search.cost.base import StageCode, stage_code
from raypar.search.cost.exact import move_of, peak_bytes, stage_pieces
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.params import BUCKET_BYTES, Move, additions, param_cost
from raypar.search.cost.work import Work, node_work
from raypar.sharding.convert import ALL_GATHER, ALL_REDUCE
from release._megatron import TENSOR_AXIS, Shape, megatron_plan, mesh_slice
from release._rings import ring_machine
from release.workloads import gpt

_LAYERS = (1, 1, 2, 1)
_SIZES = (2, 4)
"""Microbatches that are lowered; others follow, since work is a straight line over them."""
STATE_BYTES = 20
"""Bytes per parameter in mixed precision: half-precision weight and gradient, and float32 weight,
gradient and two states of Adam."""


class _Measured(NamedTuple):
    flops: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    moves: tuple[Move, ...]
    params: int
    activations: int


@dataclass(frozen=True)
class Part:
    """Forward and backward of some layers: work per op, at two microbatch sizes.

    Attributes:
        flops: Products' FLOPs, shape (sizes, ops); 0 for other ops.
        nbytes: Bytes moved, shape (sizes, ops).
        moves: Collectives at both sizes.
        params: Bytes of parameters on one device.
        activations: Most bytes that backward holds at the smaller size.
    """

    flops: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    moves: tuple[tuple[Move, ...], ...]
    params: int
    activations: int


@dataclass(frozen=True)
class Layers:
    """Parts of one GPT at one width, number of heads and tensor parallelism.

    Attributes:
        parts: The four stages (module docstring).
        edge_bytes: Bytes of one value between layers per sequence.
        tied_bytes: Of the embedding's weights on one device.
    """

    parts: tuple[Part, ...]
    edge_bytes: int
    tied_bytes: int


@cache
def layers_of(hidden: int, heads: int, tensor: int, sequence: int, vocabulary: int) -> Layers:
    """Lowers five layers and takes them apart."""
    cluster = Cluster.virtual(nodes=len(_LAYERS), devices_per_node=tensor, device="V100")
    found = []
    for size in _SIZES:
        shape = Shape(1, tensor, len(_LAYERS), 1, 2)
        graph = gpt(
            sum(_LAYERS), hidden, heads, 2 * size,
            sequence=sequence, vocabulary=vocabulary, explicit=True, tied=True,
        ).capture()  # fmt: skip
        plan = megatron_plan(graph, cluster, _LAYERS, shape)
        lowered = lower_plan(graph, plan)
        found.append([_measure(stage_code(lowered, plan, s)) for s in range(len(_LAYERS))])
    parts = tuple(
        Part(
            np.stack([small.flops, large.flops]),
            np.stack([small.nbytes, large.nbytes]),
            (small.moves, large.moves),
            small.params,
            small.activations,
        )
        for small, large in zip(*found, strict=True)
    )
    half = 2  # bytes
    return Layers(parts, half * sequence * hidden, half * vocabulary * hidden // tensor)


def _measure(code: StageCode) -> _Measured:
    pieces = stage_pieces(code)
    assert pieces.parts is not None
    works: list[Work] = []
    moves = []
    for node in (*pieces.forward.nodes, *pieces.parts.backward.nodes):
        move = move_of(node)
        if move is not None:
            moves.append(move)
            continue
        work = node_work(node)
        if work.kind not in ("view", "none"):
            works.append(work)
    params = param_cost(code)
    # Every microbatch's gradients are added to what is there.
    for adding, count in additions(params, pieces.products).items():
        works += [adding] * count
        for _ in range(-count):  # products that read their sums take its place
            works.remove(adding)
    return _Measured(
        np.array([work.flops if work.matmul else 0.0 for work in works]),
        np.array([work.nbytes for work in works]),
        tuple(moves),
        params.param_bytes,
        peak_bytes(pieces.parts.backward),
    )


def part_seconds(part: Part, size: int, machine: MeshMachine) -> float:
    """Seconds of one microbatch of `size` sequences, forward and backward, collectives included."""
    device, rates = machine.kinds[0]
    share = (size - _SIZES[0]) / (_SIZES[1] - _SIZES[0])
    flops = part.flops[0] + share * (part.flops[1] - part.flops[0])
    nbytes = part.nbytes[0] + share * (part.nbytes[1] - part.nbytes[0])
    curve = rates.curve("float16")
    work = np.where(flops > 0, (flops + curve.half) / (curve.top * device.peak("float16")), 0.0)
    traffic = nbytes / rates.bytes_curve("plain").near
    seconds = float(np.maximum(work, traffic).sum()) + len(flops) * rates.overhead
    known: dict[tuple[Move, Move], float] = {}
    for pair in zip(*part.moves, strict=True):
        if pair not in known:
            small, large = pair
            now = small.nbytes + share * (large.nbytes - small.nbytes)
            known[pair] = machine.collective_s(small.axis, small.kind, now)
        seconds += known[pair]
    return seconds


@dataclass(frozen=True)
class Job:
    """What is predicted: a GPT of some depth, split in some way.

    Attributes:
        layers: Its parts.
        depth: How many layers it has.
        size: Sequences of a microbatch.
        shape: How it is split.
    """

    layers: Layers
    depth: int
    size: int
    shape: Shape

    @property
    def per_stage(self) -> int:
        """Layers of a stage."""
        return self.depth // self.shape.stages


def step_seconds(job: Job, cluster: Cluster, calibration: Calibration) -> float:
    """Seconds of a step."""
    shape, parts = job.shape, job.layers.parts
    machine = ring_machine(cluster, mesh_slice(0, shape), calibration)
    first, one, two, last = (part_seconds(p, job.size, machine) for p in parts)
    more, extra = two - one, job.per_stage - 1
    once = max(_once(job, machine, nbytes) for nbytes in _params(job))
    if shape.stages == 1:
        return shape.microbatches * (first + last - one + extra * more) + once
    handing = 2 * handing_seconds(job, cluster, calibration)
    groups = [shape.chunks * (one + extra * more + handing)] * shape.pipeline
    groups[0] += first - one
    groups[-1] += last - one
    slowest = max(groups)
    fill = (sum(groups) - slowest) / shape.chunks
    return shape.microbatches * slowest + fill + once


def _params(job: Job) -> list[int]:
    """Bytes of parameters on a device of every rank group."""
    first, one, _, last = (part.params for part in job.layers.parts)
    if job.shape.pipeline == 1:
        return [first + last + (job.depth - 2) * one - job.layers.tied_bytes]
    groups = [job.depth // job.shape.pipeline * one] * job.shape.pipeline
    groups[0] += first - one
    groups[-1] += last - one
    return groups


def handing_seconds(job: Job, cluster: Cluster, calibration: Calibration) -> float:
    """Seconds that a stage stands still to hand on one value, and to be handed one.

    Megatron-LM waits for its messages. Each device sends its share of the value to its counterpart
    on the next stage, where devices that share layers put it together again (Narayanan et al.
    2021, section 4.1); both directions go at once.
    """
    size = job.shape.data * job.shape.tensor
    link = cluster.link(0, size)
    inside = cluster.device(0)[0] == cluster.device(size)[0]
    rates = (calibration.inside if inside else calibration.across).p2p
    nbytes = job.layers.edge_bytes * job.size
    share = nbytes / job.shape.tensor
    seconds = rates.latency + share / (link.bandwidth * rates.efficiency)
    if job.shape.tensor > 1:
        machine = ring_machine(cluster, mesh_slice(0, job.shape), calibration)
        seconds += machine.collective_s(TENSOR_AXIS, ALL_GATHER, nbytes)
    return seconds


def _once(job: Job, machine: MeshMachine, nbytes: int) -> float:
    """Gradients over replicas and the optimizer's step, of one device's parameters."""
    seconds = machine.optimizer_s(nbytes)
    if job.shape.data > 1:
        count = max(1, round(nbytes / BUCKET_BYTES))
        seconds += count * machine.collective_s(DATA, ALL_REDUCE, nbytes / count)
    return seconds


def memory_bytes(job: Job) -> int:
    """Bytes that the fullest device holds, with one layer recomputed at a time."""
    shape, layers = job.shape, job.layers
    own = job.depth // shape.pipeline
    params = max(_params(job))
    in_flight = min(shape.microbatches, shape.pipeline)
    share = 1 + (shape.pipeline - 1) / (shape.pipeline * shape.chunks) if shape.chunks > 1 else 1
    inputs = layers.edge_bytes * job.size * own * in_flight * share
    times = job.size / _SIZES[0]
    ends = (layers.parts[0].activations, layers.parts[3].activations)
    return int(params / 2 * STATE_BYTES + inputs + max(ends) * times)
