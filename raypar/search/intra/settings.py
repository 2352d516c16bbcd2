"""What a sharding is chosen for, and the graph it is chosen for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.graph.build import CleanGraph
from raypar.graph.costs import size_of
from raypar.programs.slicing import StageGraph
from raypar.sharding.rules.base import OpView, Strategy, is_tensor
from raypar.sharding.spec import ShardingSpec

Allowed = Callable[[OpView, Strategy], bool]
"""Which strategies of an op may be chosen; the whole-on-every-rank one always may."""


@dataclass(frozen=True)
class IntraSettings:
    """What a sharding is chosen for.

    Attributes:
        microbatches: M; activations are converted and ops run M times a step.
        in_flight: Microbatches whose saved activations are held at once.
        memory_bytes: What one device may hold (parameters with gradients and optimizer states,
            saved activations); None: as much as it wants.
        zero: ZeRO level, 0 to 3.
        recompute: ``none``, ``selective`` or ``full``.
        optimizer_states: Tensors that the optimizer keeps for each parameter (Adam: 2).
        allowed: Which strategies may be chosen; see `raypar.search.intra.allowed`.
        arriving: Received value → how it lies; others arrive as their readers ask.
        trainable: Names of the parameters with a gradient; None: all of floating point.
        time_limit_s: Seconds after which the best found so far is returned.
        gap: Relative distance to the lower bound that is good enough under a memory limit.
    """

    microbatches: int = 1
    in_flight: int = 1
    memory_bytes: float | None = None
    zero: int = 0
    recompute: str = "none"
    optimizer_states: int = 2
    allowed: Allowed | None = None
    arriving: Mapping[str, ShardingSpec] = field(default_factory=dict)
    trainable: frozenset[str] | None = None
    time_limit_s: float = 10.0
    gap: float = 0.005


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor: what a placeholder holds, or one result of an op.

    Attributes:
        node: Who makes it (never a ``getitem``).
        index: Which of its tensor results.
        tensor: Its fake value.
        nbytes: Its size in bytes.
    """

    node: fx.Node
    index: int
    tensor: torch.Tensor = field(compare=False, repr=False)
    nbytes: int = field(compare=False)

    @property
    def id(self) -> str:
        """Id of the node that makes it."""
        return str(self.node.meta["id"])

    @property
    def form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Its shape (-1 for a size that depends on the data) and dtype."""
        sizes = tuple(n if isinstance(n, int) else -1 for n in self.tensor.shape)
        return sizes, self.tensor.dtype

    @property
    def floats(self) -> bool:
        """Whether it is of floating point (or complex)."""
        return self.tensor.is_floating_point() or self.tensor.is_complex()


@dataclass(frozen=True)
class Graph:
    """A forward graph as the search sees it.

    Attributes:
        ops: Every call besides ``getitem``, in order.
        reads: For every op the values of its tensor arguments (as `OpView.tensors`).
        makes: For every op its tensor results.
        outputs: Values that leave: True where other stages read it (it may leave cut).
        flow: Values that receive a gradient.
    """

    ops: tuple[fx.Node, ...]
    reads: Mapping[fx.Node, tuple[Value, ...]]
    makes: Mapping[fx.Node, tuple[Value, ...]]
    outputs: tuple[tuple[Value, bool], ...]
    flow: frozenset[Value]


def read_graph(
    source: CleanGraph | StageGraph | fx.Graph, trainable: frozenset[str] | None
) -> Graph:
    """The values of a graph, who reads them, and which have gradients.

    Args:
        source: A whole model or a stage, at the size of one microbatch on one replica. The output
            of a bare graph is one tuple whose values all leave whole.
        trainable: Names of the parameters with a gradient; None: all of floating point.
    """
    graph = source if isinstance(source, fx.Graph) else source.graph
    departing = len(source.edges_out) if isinstance(source, StageGraph) else 0
    ops: list[fx.Node] = []
    held: list[Value] = []
    outputs: list[tuple[Value, bool]] = []
    reads: dict[fx.Node, tuple[Value, ...]] = {}
    makes: dict[fx.Node, tuple[Value, ...]] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and is_tensor(node.meta.get("val")):
            makes[node] = _made(node, (node.meta["val"],))
            held += makes[node]
        elif node.op == "call_function" and node.target is not operator.getitem:
            view = OpView(node)
            ops.append(node)
            makes[node] = _made(node, view.results)
            reads[node] = tuple(_read(t, makes) for t in view.tensors)
        elif node.op == "output":
            for i, item in enumerate(_leaves(node.args[0])):
                if is_tensor(item.meta.get("val")):
                    outputs.append((_read(item, makes), i < departing))
    flow = _flow(ops, reads, makes, held, {v.node for v, _ in outputs}, trainable)
    return Graph(tuple(ops), reads, makes, tuple(outputs), flow)


def _made(node: fx.Node, tensors: Iterable[torch.Tensor]) -> tuple[Value, ...]:
    return tuple(Value(node, i, t, size_of(t)) for i, t in enumerate(tensors))


def _leaves(item: Any) -> list[fx.Node]:
    if isinstance(item, fx.Node):
        return [item]
    return [n for part in item for n in _leaves(part)] if isinstance(item, (list, tuple)) else []


def _read(node: fx.Node, makes: Mapping[fx.Node, tuple[Value, ...]]) -> Value:
    """The value that a node stands for; pieces belong to the op that made them."""
    if node.target is not operator.getitem:
        return makes[node][0]
    source, index = node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    made = source.meta["val"]
    return makes[source][sum(is_tensor(v) for v in made[: index % len(made)])]


def _flow(
    ops: list[fx.Node],
    reads: Mapping[fx.Node, tuple[Value, ...]],
    makes: Mapping[fx.Node, tuple[Value, ...]],
    held: list[Value],
    wanted: set[fx.Node],
    trainable: frozenset[str] | None,
) -> frozenset[Value]:
    """Values of floating point between what is trained (or received) and what leaves."""
    moved: set[Value] = set()
    for value in held:
        kind, _, name = value.id.partition(":")
        trained = kind == "param" and (trainable is None or name in trainable)
        if (trained or kind == "edge") and value.floats:
            moved.add(value)
    for op in ops:
        if op.target is not torch.ops.aten.detach.default and any(v in moved for v in reads[op]):
            moved |= {v for v in makes[op] if v.floats}
    for op in reversed(ops):
        if op in wanted:
            wanted |= {v.node for v in reads[op]}
    return frozenset(v for v in moved if v.node in wanted)
