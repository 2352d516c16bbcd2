"""Graphs of other batch sizes, written from the two captures that are there anyway.

A model of a hundred layers takes seconds to capture, and a search looks at many microbatch sizes.
Where a number differs between the graphs of the global batch and of its double, it is taken to grow
evenly with the batch, and the ops run again on fake tensors of the new size. Only what a search
says rests on that: what is run was captured at its own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from raypar.compat import FakeTensor
from raypar.errors import CaptureError
from raypar.graph.batch import RATIO
from raypar.graph.build import CleanGraph
from raypar.graph.fake_calls import remembered_call
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.randomness import SEEDED

FEW_OPS = 300
"""Models of fewer ops are captured at every size: that takes a fraction of a second."""


class NotEven(Exception):
    """A number does not grow evenly with the batch."""


def even(graph: OpGraph) -> OpGraph:
    """The same model for a search; its graphs of other batch sizes are written, not captured.

    It is `graph` itself for models of few ops, and where samples meet: code that looks at a whole
    batch may refuse a small one, as batch normalisation does with a single sample.
    """
    if len(graph.ops) < FEW_OPS or graph.feels_microbatches:
        return graph
    if "even" not in graph.memo:
        graph.memo["even"] = _EvenGraph.of(graph)
    found: OpGraph = graph.memo["even"]
    return found


class _EvenGraph(OpGraph):
    """See `even`."""

    _captured: OpGraph

    @classmethod
    def of(cls, graph: OpGraph) -> _EvenGraph:
        """Shares everything but the graphs of other sizes."""
        _ = graph.analysis, graph.cuts, graph.cloneable, graph.hash  # what both need is found once
        found = object.__new__(cls)
        found.__dict__.update(graph.__dict__)
        found._captured, found._sized = graph, dict(graph._sized)
        return found

    def _build(self, local_batch: int) -> CleanGraph:
        try:
            return self._written(local_batch)
        except (NotEven, CaptureError, RuntimeError):
            return self._captured.at(local_batch)

    def _written(self, size: int) -> CleanGraph:
        # The larger one is copied: nobody has laid out its random ops for a part of the batch.
        twin = self._captured.at(RATIO * self.global_batch)
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in twin.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        scale = Scale(self.global_batch, size)
        resize(graph, self.clean.graph, twin.graph, scale)
        return CleanGraph(
            graph,
            {name: copies[node] for name, node in twin.params.items()},
            {name: copies[node] for name, node in twin.buffers.items()},
            [copies[node] for node in twin.inputs],
            {key: (copies[node], value) for key, (node, value) in twin.constants.items()},
            copies[twin.rng],
            {name: copies[node] for name, node in twin.updates.items()},
            tuple(copies[node] for node in twin.results),
        )


class Scale:
    """From a number at the global batch and at its double to that at another size.

    Args:
        whole: Samples of the global batch.
        size: Samples of the other one.
    """

    def __init__(self, whole: int, size: int) -> None:
        self.whole, self.size = whole, size

    def of(self, one: Any, other: Any) -> Any:
        """Whole numbers, or sequences of them.

        Raises:
            NotEven: They do not grow evenly.
        """
        if isinstance(one, (list, tuple)):
            return type(one)([self.of(a, b) for a, b in zip(one, other, strict=True)])
        if not isinstance(one, int) or not isinstance(other, int):
            raise NotEven
        growth = (other - one) * (self.size - self.whole)
        steps, rest = divmod(growth, (RATIO - 1) * self.whole)
        if rest or (steps and one + steps < 0):
            raise NotEven
        return one + steps

    def tensor(self, one: Any, other: Any) -> Any:
        """A value like `one` whose dims have the new size."""
        if not isinstance(one, FakeTensor):
            return one
        shape = self.of(tuple(one.shape), tuple(other.shape))
        return one.detach() if shape == tuple(one.shape) else one.new_empty(shape)


def resize(written: fx.Graph, small: fx.Graph, large: fx.Graph, scale: Scale) -> None:
    """Rewrites a copy of the graph for another batch size, with fake values of that size.

    Random ops are not laid out for it (`raypar.graph.opgraph.lay_out_random`).

    Args:
        written: A copy of `small` or of `large`.
        small: The graph of the global batch.
        large: That of its double.
        scale: The sizes.

    Raises:
        NotEven: The graphs are not of the same ops, or a number does not grow evenly.
    """
    if not len(small.nodes) == len(large.nodes) == len(written.nodes):
        raise NotEven
    mode = next(v.fake_mode for n in small.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
    for one, other, node in zip(small.nodes, large.nodes, written.nodes, strict=True):
        if one.op != other.op or (one.op != "placeholder" and one.target != other.target):
            raise NotEven
        if node.op == "output":
            continue
        mine, theirs = one.meta["val"], other.meta["val"]
        if node.op == "placeholder":
            with mode:
                node.meta["val"] = scale.tensor(mine, theirs)
            continue
        _rewrite(node, one, other, scale)
        value = remembered_call(node.target, node.args, node.kwargs, node, written)
        if isinstance(mine, torch.Tensor):
            shape = scale.of(tuple(mine.shape), tuple(theirs.shape))
            strides = scale.of(mine.stride(), theirs.stride())
            if tuple(value.shape) != shape:
                raise NotEven
            # Some kernels lay their results out in another way where gradients are wanted.
            wrong = zip(shape, value.stride(), strides, strict=True)
            if any(n > 1 and found != wanted for n, found, wanted in wrong):
                with mode:
                    value = value.new_empty_strided(shape, strides)
        node.meta["val"] = value


def _rewrite(node: fx.Node, one: fx.Node, other: fx.Node, scale: Scale) -> None:
    if node.target is SEEDED:  # its layout is filled in for the size; only the shape grows
        node.args = (*node.args[:2], scale.of(one.args[2], other.args[2]), *node.args[3:])
        return
    node.args = _merge(node.args, one.args, other.args, scale)
    node.kwargs = _merge(node.kwargs, one.kwargs, other.kwargs, scale)


def _merge(mine: Any, one: Any, other: Any, scale: Scale) -> Any:
    """`mine` with its whole numbers at the new size."""
    if isinstance(mine, dict):
        return {k: _merge(v, one[k], other[k], scale) for k, v in mine.items()}
    if isinstance(mine, (list, tuple)):
        if len(one) != len(other):
            raise NotEven
        parts = [_merge(*three, scale) for three in zip(mine, one, other, strict=True)]
        return type(mine)(parts)
    if isinstance(mine, int) and not isinstance(mine, bool):
        return scale.of(one, other)
    return mine
