"""The short graph at other batch sizes, without capturing the whole model once for each.

A model of a hundred layers takes seconds to capture, a search looks at many microbatch sizes, and
of every size it prices a few layers only. Those are written from the two captures that are there
anyway (the global batch and its double): a number that differs between them is taken to grow
evenly with the batch, and the few ops run again on fake tensors of the new size. Only prices rest
on that: what is lowered and run was captured at its own size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from raypar.compat import FakeTensor
from raypar.errors import CaptureError
from raypar.graph.batch import RATIO
from raypar.graph.build import CleanGraph
from raypar.graph.opgraph import OpGraph, lay_out_random
from raypar.graph.passes.randomness import SEEDED
from raypar.graph.replay import replay
from raypar.search.interop.units import Units, shorten

_FEW_OPS = 300
"""Models of fewer ops are captured at every size: that takes a fraction of a second."""

Short = tuple[fx.Graph, list[list[fx.Node]]]


class _NotEven(Exception):
    """A number does not grow evenly with the batch."""


def short_at(graph: OpGraph, units: Units, local_batch: int) -> Short:
    """`raypar.search.interop.units.shorten` of the graph of one microbatch on one replica.

    Args:
        graph: The captured model.
        units: Its units.
        local_batch: Samples of the microbatch.
    """
    if len(graph.ops) >= _FEW_OPS and local_batch != graph.global_batch:
        try:
            return _scaled(graph, units, local_batch)
        except (_NotEven, CaptureError, RuntimeError):
            pass  # not a model that grows evenly: it is captured
    return shorten(graph.local(local_batch), units)


def _scaled(graph: OpGraph, units: Units, size: int) -> Short:
    key = ("two sizes", units)
    if key not in graph.memo:
        graph.memo[key] = (
            shorten(graph.clean, units)[0],
            shorten(graph.at(RATIO * graph.global_batch), units)[0],
        )
    small, large = graph.memo[key]
    written, members = shorten(graph.clean, units)
    scale = _Scale(graph.global_batch, size)
    mode = graph.clean.rng.meta["val"].fake_mode
    values: dict[fx.Node, Any] = {}
    triples = zip(small.nodes, large.nodes, written.nodes, strict=True)
    for one, other, node in triples:
        if one.op != other.op or (one.op != "placeholder" and one.target != other.target):
            raise _NotEven
        if node.op == "placeholder":
            with mode:
                values[node] = scale.tensor(one.meta["val"], other.meta["val"])
            node.meta["val"] = values[node]
        elif node.op == "call_function":
            _rewrite(node, one, other, scale)
    clean: CleanGraph = replace(graph.clean, graph=written)
    lay_out_random(clean, graph.analysis, size)

    def note(node: fx.Node, value: Any) -> None:
        node.meta["val"] = value

    with mode, torch.no_grad():
        replay(written, values, note)
    return written, members


def _rewrite(node: fx.Node, one: fx.Node, other: fx.Node, scale: _Scale) -> None:
    if node.target is SEEDED:  # its layout is filled in for the size; only the shape grows
        node.args = (*node.args[:2], scale.of(one.args[2], other.args[2]), *node.args[3:])
        return
    node.args = _merge(node.args, one.args, other.args, scale)
    node.kwargs = _merge(node.kwargs, one.kwargs, other.kwargs, scale)


def _merge(mine: Any, one: Any, other: Any, scale: _Scale) -> Any:
    """`mine` with its whole numbers at the new size."""
    if isinstance(mine, dict):
        return {k: _merge(v, one[k], other[k], scale) for k, v in mine.items()}
    if isinstance(mine, (list, tuple)):
        if len(one) != len(other):
            raise _NotEven
        parts = [_merge(*three, scale) for three in zip(mine, one, other, strict=True)]
        return type(mine)(parts)
    if isinstance(mine, int) and not isinstance(mine, bool):
        return scale.of(one, other)
    return mine


class _Scale:
    """From a number at the global batch and at its double to that at another size."""

    def __init__(self, whole: int, size: int) -> None:
        self.whole, self.size = whole, size

    def of(self, one: Any, other: Any) -> Any:
        """Whole numbers, or sequences of them.

        Raises:
            _NotEven: They do not grow evenly.
        """
        if isinstance(one, (list, tuple)):
            return type(one)([self.of(a, b) for a, b in zip(one, other, strict=True)])
        if not isinstance(one, int) or not isinstance(other, int):
            raise _NotEven
        growth = (other - one) * (self.size - self.whole)
        steps, rest = divmod(growth, (RATIO - 1) * self.whole)
        if rest or (steps and one + steps < 0):
            raise _NotEven
        return one + steps

    def tensor(self, one: Any, other: Any) -> Any:
        """A value like `one` whose dims have the new size."""
        if not isinstance(one, FakeTensor):
            return one
        shape = self.of(tuple(one.shape), tuple(other.shape))
        return one.detach() if shape == tuple(one.shape) else one.new_empty(shape)
