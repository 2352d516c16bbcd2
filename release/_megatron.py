"""Plans as Megatron-LM made them: whole layers per stage, tensor parallelism by its two rules.

Shoeybi et al. 2019 ("Megatron-LM", section 3): the first product of attention and of the
feed-forward part is cut by columns, the second by rows, and the embedding by vocabulary, so that
activations between them are whole on every device. Narayanan et al. 2021 ("Efficient Large-Scale
Language Model Training on GPU Clusters", section 2): stages of equally many layers, several of
them per device where the schedule interleaves; tensor parallelism innermost, pipeline outermost.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import DATA, MemoryPolicy, MeshSlice, Plan, StagePlan
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import P, R
from raypar.sharding.strategies import fold_patterns, strategies

TENSOR_AXIS = "tensor"
_COLUMNS = ("/q/linear", "/k/linear", "/v/linear", "/up/linear", "head/linear")


@dataclass(frozen=True)
class Shape:
    """How many ways a model is split.

    Attributes:
        data: Replicas.
        tensor: Devices that share every layer.
        pipeline: Rank groups.
        chunks: Stages per rank group.
        microbatches: M.
    """

    data: int
    tensor: int
    pipeline: int
    chunks: int
    microbatches: int

    @property
    def stages(self) -> int:
        """Stages in all."""
        return self.pipeline * self.chunks


def tensor_sharding(graph: fx.Graph, size: int) -> dict[str, str]:
    """Op id → strategy: columns, rows, vocabulary; what follows a part works on that part.

    Args:
        graph: The captured GPT at the size of one microbatch on one replica.
        size: Devices that share every layer.

    Raises:
        PlanError: The sizes of a layer do not divide.
    """
    if size == 1:
        return {}
    parts: dict[fx.Node, str] = {}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        chosen = _choose(node, parts, size)
        if chosen is None:
            continue
        found[node.meta["id"]] = str(chosen)
        out = chosen.outputs[0][0]
        if out not in (R, P):  # a sum is completed before anybody reads it
            parts[node] = out
    return found


def _choose(node: fx.Node, parts: dict[fx.Node, str], size: int) -> Strategy | None:
    key = "/" + node.meta["id"].replace(".", "/")
    op = OpView(node)
    seeded = any(column in key for column in _COLUMNS)
    vocabulary = "/tokens/embedding" in key
    reads = [parts.get(source) for source in op.tensors]
    if not (seeded or vocabulary or any(reads)):
        return None
    fitting = []
    for strategy in strategies(node, (size,))[1:]:
        inputs = [spec[0] for spec in strategy.inputs]
        out = strategy.outputs[0][0]
        if seeded:
            good = inputs[1] == "S0" and out == f"S{len(op.results[0].shape) - 1}"
        elif vocabulary:
            good = "S0" in inputs and out == P
        else:
            good = all(read is None or read == own for read, own in zip(reads, inputs, strict=True))
        if good:
            fitting.append(strategy)
    if not fitting:
        raise PlanError(
            f"op {node.meta['id']!r} cannot be shared by {size} devices as Megatron-LM does: its "
            f"inputs have shapes {list(op.shapes)}; take a number that divides heads and widths"
        )
    # Of several, the one that moves least: whole inputs rather than sums.
    return min(fitting, key=lambda s: sum(spec[0] == P for spec in s.inputs))


def stage_bounds(graph: OpGraph, layers: Sequence[int]) -> list[int]:
    """Positions of the ops at which stages of so many layers begin, and the end."""
    first: dict[int, int] = {}
    for position, op in enumerate(graph.ops):
        path = op.id.partition("/")[0].split(".")
        if path[0] == "blocks":
            first.setdefault(int(path[1]), position)
    starts = list(itertools.accumulate(layers))[:-1]
    return [0, *(first[layer] for layer in starts), len(graph.ops)]


def equal_stages(layers: int, stages: int) -> list[int]:
    """Layers of every stage.

    Raises:
        PlanError: They do not divide.
    """
    if layers % stages:
        raise PlanError(f"{layers} layers do not divide into {stages} stages")
    return [layers // stages] * stages


def megatron_plan(graph: OpGraph, cluster: Cluster, layers: Sequence[int], shape: Shape) -> Plan:
    """The plan that Megatron-LM runs with these numbers.

    Args:
        graph: The captured GPT.
        cluster: At least as many devices as the shape needs.
        layers: Of every stage.
        shape: How many ways it is split.

    Raises:
        PlanError: The numbers do not divide the model.
    """
    bounds = stage_bounds(graph, layers)
    local = graph.global_batch // (shape.data * shape.microbatches)
    exact = tensor_sharding(graph.local(local).graph, shape.tensor)
    ids = [op.id for op in graph.ops]
    stages = tuple(
        StagePlan(
            first=ids[bounds[s]],
            last=ids[bounds[s + 1] - 1],
            mesh=mesh_slice(s % shape.pipeline, shape),
            memory=MemoryPolicy("full"),
            sharding=fold_patterns(exact, ids[bounds[s] : bounds[s + 1]]),
        )
        for s in range(shape.stages)
    )
    placement = tuple((s % shape.pipeline, s // shape.pipeline) for s in range(shape.stages))
    return Plan.of(
        graph,
        cluster,
        stages,
        microbatches=shape.microbatches,
        schedule="interleaved_1f1b" if shape.chunks > 1 else "1f1b",
        placement=placement,
    )


def mesh_slice(group: int, shape: Shape) -> MeshSlice:
    """Devices of a rank group: tensor parallelism between neighbours, replicas next to them."""
    size = shape.data * shape.tensor
    devices = tuple(range(group * size, (group + 1) * size))
    if shape.tensor == 1:
        return MeshSlice(devices, (shape.data,))
    return MeshSlice(devices, (shape.data, shape.tensor), (DATA, TENSOR_AXIS))
