"""Cuts a clean graph into stages: contiguous op ranges, with named edges for what crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.errors import PlanError
from raypar.graph.build import CleanGraph
from raypar.graph.costs import size_of


@dataclass
class StageGraph:
    """One stage's forward graph.

    Placeholders carry ``meta["id"]``: ``param:NAME``, ``buffer:NAME``, ``in:I``, ``const:K``,
    ``rng``, ``edge:ID`` (a value from another stage) or ``global:ID`` (a value summed over the
    whole batch before the step). The output is one tuple: edges, then the results (the loss) that
    this stage makes, then buffer updates.

    Attributes:
        index: Number of the stage.
        graph: The forward graph.
        edges_out: Ids of the values other stages need, in output order.
        has_loss: Whether the loss is made here.
        updates: Names of the buffers whose new values end the output.
        globals_graph: Computes this part's share of every global used here, or None.
        globals: Ids of those globals, in output order.
        results: Numbers of the results that are made here, in output order.
    """

    index: int
    graph: fx.Graph
    edges_out: tuple[str, ...]
    has_loss: bool
    updates: tuple[str, ...]
    globals_graph: fx.Graph | None = None
    globals: tuple[str, ...] = ()
    results: tuple[int, ...] = ()

    def keys(self, prefix: str) -> list[str]:
        """Ids of what this stage reads of one kind, without their prefix, in order.

        What only the batch-wide counts read (a buffer of class weights) comes last.
        """
        graphs = [self.graph, *([] if self.globals_graph is None else [self.globals_graph])]
        found = [
            n.meta["id"].removeprefix(prefix)
            for graph in graphs
            for n in graph.nodes
            if n.op == "placeholder" and n.meta["id"].startswith(prefix)
        ]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class ValueEdge:
    """A value that crosses stages.

    Attributes:
        id: Canonical id of the value.
        source: Producing stage.
        targets: Consuming stages, ascending.
        shape: Shape for one microbatch on one replica.
        dtype: Its dtype.
        nbytes: Its size in bytes.
    """

    id: str
    source: int
    targets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass
class _Need:
    """What one stage needs: its live ops, and values from elsewhere."""

    live: set[fx.Node] = field(default_factory=set)
    edges: list[fx.Node] = field(default_factory=list)
    globals: list[fx.Node] = field(default_factory=list)


def slice_stages(
    clean: CleanGraph,
    ranges: Sequence[tuple[int, int]],
    cloneable: frozenset[str],
    globals_: Mapping[str, int],
    results: Sequence[fx.Node] | None = None,
) -> tuple[list[StageGraph], list[ValueEdge]]:
    """Cuts the graph.

    Args:
        clean: The graph at the size of one microbatch on one replica.
        ranges: For every stage its op positions ``[first, end)``; together they cover all ops.
        cloneable: Ids of ops that a stage computes itself rather than receives.
        globals_: Ids of the values that are summed over the batch ahead of the step.
        results: What to compute beside buffer updates; default: the graph's own results.

    Raises:
        PlanError: A value whose size depends on the data would cross a cut.
    """
    ops = clean.ops
    stage_of = {ops[i]: s for s, (first, end) in enumerate(ranges) for i in range(first, end)}
    roots: list[list[fx.Node]] = [[] for _ in ranges]
    wanted_results = clean.results if results is None else tuple(results)
    makers = _makers(wanted_results, stage_of, globals_)
    for node, maker in zip(wanted_results, makers, strict=True):
        roots[maker].append(node)
    for name, node in clean.updates.items():
        roots[_update_stage(clean, name, node, stage_of)].append(node)
    needs: list[_Need] = []
    requested: dict[fx.Node, list[int]] = {}
    for s in range(len(ranges) - 1, -1, -1):
        wanted = [n for n, targets in requested.items() if stage_of[n] == s]
        need = _trace_needs(s, roots[s] + wanted, stage_of, cloneable, globals_)
        for node in need.edges:
            requested.setdefault(node, []).append(s)
        needs.append(need)
    needs.reverse()
    edges = [_edge(node, stage_of[node], targets) for node, targets in requested.items()]
    place = {node.meta["id"]: i for i, node in enumerate(ops)}
    edges.sort(key=lambda e: place[e.id])
    stages = [
        _build(clean, s, need, edges, stage_of, wanted_results, makers)
        for s, need in enumerate(needs)
    ]
    return stages, edges


def _makers(
    results: Sequence[fx.Node], stage_of: Mapping[fx.Node, int], globals_: Mapping[str, int]
) -> list[int]:
    """The stage that returns each result: a count of the whole batch comes with the loss."""
    first = stage_of[results[0]]
    return [first if n.meta["id"] in globals_ else stage_of[n] for n in results]


def _update_stage(
    clean: CleanGraph, name: str, node: fx.Node, stage_of: Mapping[fx.Node, int]
) -> int:
    if node in stage_of:
        return stage_of[node]
    readers = [stage_of[u] for u in clean.buffers[name].users if u in stage_of]
    return min(readers, default=0)


def _trace_needs(
    stage: int,
    roots: Sequence[fx.Node],
    stage_of: Mapping[fx.Node, int],
    cloneable: frozenset[str],
    globals_: Mapping[str, int],
) -> _Need:
    need = _Need()
    stack = list(roots)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        key = node.meta["id"]
        if key in globals_:
            need.globals.append(node)
        elif stage_of[node] == stage or key in cloneable:
            need.live.add(node)
            stack.extend(node.all_input_nodes)
        else:
            need.edges.append(node)
    return need


def _edge(node: fx.Node, source: int, targets: Sequence[int]) -> ValueEdge:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or any(not isinstance(n, int) for n in value.shape):
        raise PlanError(
            f"the cut behind stage {source} separates {node.meta['id']!r} from its users, but its "
            "size depends on the data; choose one of graph.cuts"
        )
    return ValueEdge(
        node.meta["id"],
        source,
        tuple(sorted(targets)),
        tuple(value.shape),
        value.dtype,
        size_of(value),
    )


def _build(
    clean: CleanGraph,
    stage: int,
    need: _Need,
    edges: Sequence[ValueEdge],
    stage_of: Mapping[fx.Node, int],
    results: Sequence[fx.Node],
    makers: Sequence[int],
) -> StageGraph:
    incoming = {node: f"edge:{node.meta['id']}" for node in need.edges}
    incoming.update({node: f"global:{node.meta['id']}" for node in need.globals})
    by_id = {n.meta["id"]: n for n in clean.ops}
    edges_out = tuple(e.id for e in edges if e.source == stage)
    outputs = [by_id[key] for key in edges_out]
    own = tuple(i for i, maker in enumerate(makers) if maker == stage)
    outputs += [results[i] for i in own]
    updates = tuple(
        name
        for name, node in clean.updates.items()
        if _update_stage(clean, name, node, stage_of) == stage
    )
    outputs += [clean.updates[name] for name in updates]
    graph = extract(clean.graph, outputs, need.live, incoming)
    globals_graph = None
    if need.globals:
        globals_graph = extract(clean.graph, need.globals, None, {})
    return StageGraph(
        stage,
        graph,
        edges_out,
        bool(own),
        updates,
        globals_graph,
        tuple(n.meta["id"] for n in need.globals),
        own,
    )


def extract(
    source: fx.Graph,
    outputs: Sequence[fx.Node],
    live: set[fx.Node] | None,
    incoming: Mapping[fx.Node, str],
) -> fx.Graph:
    """A new graph that computes `outputs`.

    Args:
        source: Where the nodes come from.
        outputs: What to return, as one tuple.
        live: Ops to copy; None copies every ancestor.
        incoming: Nodes that become placeholders, with their new ids.
    """
    wanted: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in wanted:
            continue
        wanted.add(node)
        if node not in incoming:
            stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def hold(node: fx.Node, key: str) -> None:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {**node.meta, "id": key}

    for node in source.nodes:
        if node in wanted and (node in incoming or node.op == "placeholder"):
            hold(node, incoming.get(node, node.meta["id"]))
    for node in source.nodes:
        if node not in wanted or node in env or node.op == "output":
            continue
        assert live is None or node in live, node
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    result: Any = tuple(env[n] for n in outputs)
    graph.output(result)
    return graph
