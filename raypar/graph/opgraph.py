"""OpGraph: the model as data."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from raypar.errors import CaptureError
from raypar.graph.align import restore_expands
from raypar.graph.batch import RATIO, BatchAnalysis, Layout, analyze
from raypar.graph.batchspec import BatchSpec
from raypar.graph.build import CleanGraph, build_graph
from raypar.graph.costs import forward_bytes, forward_flops, is_matmul_like, size_of
from raypar.graph.layers import Layer, cluster_layers, repeated_layers
from raypar.graph.op import Op
from raypar.graph.origins import Path, find_tensor
from raypar.graph.passes.emit import op_name
from raypar.graph.passes.randomness import SEEDED
from raypar.graph.states import Const
from raypar.graph.turns import in_turn, kept_in_turn

if TYPE_CHECKING:
    import networkx as nx


class OpGraph:
    """A captured model with its loss, at the size of one global batch.

    Attributes:
        clean: The pure forward graph at the global batch size.
        spec: Form of the example batch.
        model_fn: What was captured.
        loss_fn: The loss function, if any.
        memo: Room for what others worked out about this graph; it dies with the graph.
    """

    _per_sample = False

    def __init__(
        self,
        clean: CleanGraph,
        model: nn.Module,
        loss_of: Callable[[Callable[..., Any], Any], torch.Tensor],
        spec: BatchSpec,
        model_fn: Callable[[], nn.Module] | nn.Module,
        loss_fn: Callable[..., torch.Tensor] | None,
    ) -> None:
        self.clean = clean
        self.spec = spec
        self.model_fn = model_fn
        self.loss_fn = loss_fn
        self.memo: dict[object, Any] = {}
        self._model = model
        self._loss_of = loss_of
        self._sized: dict[int, CleanGraph] = {spec.size: clean}

    @property
    def model(self) -> nn.Module:
        """The module that was traced; its tensors may be on the meta device."""
        return self._model

    def loss_of(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The eager loss of a real model on a batch, as it was captured."""
        return self._loss_of(model, batch)

    @property
    def global_batch(self) -> int:
        """Samples of the example batch."""
        return self.spec.size

    @property
    def batch_dims(self) -> tuple[int | None, ...]:
        """Batch dim of every example tensor, or None for broadcast."""
        return self.spec.batch_dims

    @kept_in_turn
    def ops(self) -> tuple[Op, ...]:
        """Every op, in execution order."""
        return tuple(_op(node) for node in self.clean.ops)

    @kept_in_turn
    def index(self) -> dict[str, int]:
        """Canonical id → position in `ops`."""
        return {op.id: i for i, op in enumerate(self.ops)}

    @kept_in_turn
    def layers(self) -> list[Layer]:
        """Consecutive ops under one module, in order."""
        return cluster_layers(self.ops)

    @property
    def repeated(self) -> dict[str, list[int]]:
        """Layer signature → indices into `layers`, for layers that occur more than once."""
        return repeated_layers(self.layers)

    @kept_in_turn
    def params(self) -> dict[str, tuple[tuple[int, ...], str, bool]]:
        """Parameter name → (shape, dtype, trainable)."""
        return {
            n: (tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad)
            for n, p in self._model.named_parameters()
        }

    @kept_in_turn
    def hash(self) -> str:
        """Hash of ops, shapes and edges."""
        digest = hashlib.sha256()
        for op in self.ops:
            digest.update(
                repr((op.id, op.name, op.inputs, op.shapes, op.dtypes, op.arguments)).encode()
            )
        digest.update(self.params_hash.encode())
        return digest.hexdigest()[:32]

    @kept_in_turn
    def params_hash(self) -> str:
        """Hash of the parameters' names and shapes."""
        return hashlib.sha256(repr(sorted(self.params.items())).encode()).hexdigest()[:32]

    @kept_in_turn
    def dtypes(self) -> frozenset[torch.dtype]:
        """Floating-point dtypes that occur in the graph."""
        found = set()
        for node in self.clean.graph.nodes:
            value = node.meta.get("val")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, torch.Tensor) and item.is_floating_point():
                    found.add(item.dtype)
        return frozenset(found)

    @in_turn
    def at(self, local_batch: int) -> CleanGraph:
        """The same graph for another batch size; cached.

        Raises:
            CaptureError: The model's ops are not the same at that size.
        """
        if local_batch not in self._sized:
            graph = self._build(local_batch)
            if [n.meta["id"] for n in graph.ops] != [n.meta["id"] for n in self.clean.ops]:
                restore_expands(self.clean, graph)
            mine, theirs = self.clean.ops, graph.ops
            for a, b in zip(mine, theirs, strict=False):
                if a.meta["id"] != b.meta["id"]:
                    raise self._differs(local_batch, a.meta["id"], b.meta["id"], b)
            if len(mine) != len(theirs):
                raise self._differs(
                    local_batch, f"{len(mine)} ops", f"{len(theirs)} ops", theirs[-1]
                )
            self._sized[local_batch] = graph
        return self._sized[local_batch]

    def _build(self, local_batch: int) -> CleanGraph:
        return build_graph(self._model, self._loss_of, self.spec, local_batch)

    @in_turn
    def local(self, local_batch: int) -> CleanGraph:
        """`at`, made ready for one part of the batch: what stages are made of.

        Every random op is told which samples it draws for, and terms of the loss that add up
        differently over the parts are weighted.
        """
        clean = self.at(local_batch)
        lay_out_random(clean, self.analysis, local_batch)
        rescale_terms(clean, self.analysis, self.global_batch // local_batch)
        return clean

    def _differs(self, size: int, mine: str, theirs: str, node: fx.Node) -> CaptureError:
        return CaptureError(
            f"{node.meta.get('source')}: the model runs other ops on a batch of {size} than on the "
            f"example batch of {self.global_batch} ({mine} became {theirs}), so the batch cannot "
            "be split: use microbatches=1 and replicas=1, or make the code independent of the size"
        )

    @kept_in_turn
    def analysis(self) -> BatchAnalysis:
        """How every value relates to the samples; see `raypar.graph.batch`."""
        try:
            twin = self.at(self.global_batch * RATIO)
        except CaptureError as error:
            found = BatchAnalysis()
            found.blockers = [(self.ops[0].id, str(error))]
            return found
        inputs = list(zip(self.clean.inputs, self.batch_dims, strict=True))
        return analyze(
            self.clean.graph, twin.graph, inputs, self.param_free, per_sample=self._per_sample
        )

    @kept_in_turn
    def param_free(self) -> set[fx.Node]:
        """Nodes that depend only on inputs, constants and unchanging buffers."""
        clean = self.clean
        tainted = set(clean.params.values()) | {clean.rng}
        tainted |= {clean.buffers[name] for name in clean.updates}
        free: set[fx.Node] = set()
        for node in clean.graph.nodes:
            if node.op == "output":
                continue
            if node in tainted or any(i in tainted for i in node.all_input_nodes):
                tainted.add(node)
            else:
                free.add(node)
        return free

    @property
    def max_replicas(self) -> int:
        """Most data-parallel replicas that train exactly: the global batch, or 1."""
        return self.global_batch if self.analysis.exact else 1

    @property
    def feels_microbatches(self) -> bool:
        """Whether the result depends on how the batch is cut (batch norm, in-batch losses)."""
        return not self.analysis.exact

    @property
    def loss_power(self) -> int | None:
        """P where the global loss is ``N**p`` times the sum over N parts; None where inexact."""
        if not self.analysis.exact:
            return None
        state = self.analysis.loss
        power = getattr(state, "power", 0)
        return power - 1 if isinstance(state, Const) else power

    @kept_in_turn
    def cloneable(self) -> frozenset[str]:
        """Ids of cheap ops that depend on inputs and constants only.

        A stage recomputes them (masks, positions, rotary tables) instead of receiving them.
        """
        limit = max(sum(op.flops for op in self.ops) // 1000, 1 << 16)
        cost: dict[fx.Node, int] = {}
        chosen: set[str] = set()
        for node in self.clean.ops:
            if node not in self.param_free or dynamic(node):
                continue
            inputs = [i for i in node.all_input_nodes if i.op == "call_function"]
            if any(i.meta["id"] not in chosen for i in inputs):
                continue
            own = forward_flops(node) if is_matmul_like(node) else 0
            cost[node] = own + sum(cost[i] for i in inputs)
            if cost[node] <= limit:
                chosen.add(node.meta["id"])
        return frozenset(chosen)

    @kept_in_turn
    def cuts(self) -> tuple[int, ...]:
        """Positions where a stage may end: cut k lies between ``ops[k-1]`` and ``ops[k]``.

        No cut lies between an op and the pieces of its output, where a data-dependent size would
        cross, or between the readers and the writer of a buffer that changes.
        """
        nodes = self.clean.ops
        place = {node: i for i, node in enumerate(nodes)}
        blocked = [0] * (len(nodes) + 1)

        def block(first: int, last: int) -> None:
            for k in range(first + 1, last + 1):
                blocked[k] = 1

        for node in nodes:
            users = [place[u] for u in node.users if u in place]
            if users and (dynamic(node) or not isinstance(node.meta.get("val"), torch.Tensor)):
                block(place[node], max(users))
        for name, new in self.clean.updates.items():
            readers = [place[u] for u in self.clean.buffers[name].users if u in place]
            spots = readers + ([place[new]] if new in place else [])
            if spots:
                block(min(spots), max(spots))
        return tuple(k for k in range(1, len(nodes)) if not blocked[k])

    def constant(self, key: str) -> torch.Tensor | Path:
        """A constant of the graph: its value, or where the model that a rank builds has it."""
        tensor = self.clean.constants[key][1]
        return find_tensor(self._model, tensor) or tensor

    def to_networkx(self) -> nx.DiGraph:
        """Ops as nodes (attribute ``op``), values as edges (attribute ``nbytes``)."""
        import networkx as nx  # a quarter of a second for every process that trains

        graph = nx.DiGraph()
        for op in self.ops:
            graph.add_node(op.id, op=op)
        for node in self.clean.ops:
            for source in node.all_input_nodes:
                if source.op == "call_function":
                    graph.add_edge(
                        source.meta["id"],
                        node.meta["id"],
                        nbytes=size_of(source.meta.get("val")),
                    )
        return graph


def lay_out_random(clean: CleanGraph, analysis: BatchAnalysis, samples: int) -> None:
    """Fills in the key and the sample layout of every seeded random op."""
    for node in clean.ops:
        if node.target is not SEEDED:
            continue
        layout = analysis.layouts.get(node.meta["id"], Layout(None, 1, keyed=True))
        rng, _, shape, _, _, _, *rest = node.args
        before, rows = 1, 1
        if layout.dim is not None:
            before = math.prod(shape[: layout.dim]) * layout.outer  # type: ignore[index, arg-type]
            rows = samples
        node.args = (rng, stable_number(node.meta["id"]), shape, rows, before, layout.keyed, *rest)


def rescale_terms(clean: CleanGraph, analysis: BatchAnalysis, parts: int) -> None:
    """Weights the second term of sums whose terms add up differently over the parts."""
    for node in clean.ops:
        found = analysis.rescales.get(node.meta["id"])
        if found is None or "rescaled" in node.meta:
            continue
        power, swap = found
        node.meta["rescaled"] = True
        factor = float(parts) ** power
        left, right, *rest = node.args
        if not isinstance(right, fx.Node):
            node.args = (left, right * factor, *rest)  # type: ignore[operator]
            continue
        if swap:
            left, right = right, left
        node.args = (left, right, *rest)
        alpha = node.kwargs.get("alpha", 1)
        node.kwargs = {**node.kwargs, "alpha": alpha * factor}  # type: ignore[operator]


def stable_number(text: str) -> int:
    """A 62-bit number of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def dynamic(node: fx.Node) -> bool:
    """Whether the node's value is, or has, a size that depends on the data."""
    value = node.meta.get("val")
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool):
            return True
        if isinstance(item, torch.Tensor) and any(not isinstance(n, int) for n in item.shape):
            return True
    return False


def _op(node: fx.Node) -> Op:
    value = node.meta.get("val")
    tensors = [
        v
        for v in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(v, torch.Tensor)
    ]
    inputs = tuple(i.meta["id"] for i in node.all_input_nodes)
    return Op(
        id=node.meta["id"],
        name="getitem" if node.target is operator.getitem else op_name(node),
        module=node.meta.get("module_path", ""),
        source=node.meta.get("source", "unknown line"),
        inputs=inputs,
        params=tuple(i.removeprefix("param:") for i in inputs if i.startswith("param:")),
        shapes=tuple(tuple(n if isinstance(n, int) else -1 for n in t.shape) for t in tensors),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in tensors),
        arguments=_arguments(node),
        flops=forward_flops(node),
        nbytes=forward_bytes(node),
        out_bytes=size_of(value),
    )


def _arguments(node: fx.Node) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "%"
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value)

    return repr([plain(list(node.args)), {k: plain(v) for k, v in node.kwargs.items()}])
