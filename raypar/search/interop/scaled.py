"""The short graph of a model's distinct layers at other batch sizes.

Of every microbatch size a search prices a few layers only. Where that pays, they are written for
the size from the two captures that are there anyway (`raypar.graph.even`).
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from raypar.errors import CaptureError
from raypar.graph.batch import RATIO
from raypar.graph.build import CleanGraph
from raypar.graph.even import FEW_OPS, NotEven, Scale, resize
from raypar.graph.opgraph import OpGraph, lay_out_random
from raypar.search.interop.units import Units, shorten

Short = tuple[fx.Graph, list[list[fx.Node]]]


def short_at(graph: OpGraph, units: Units, local_batch: int) -> Short:
    """`raypar.search.interop.units.shorten` of the graph of one microbatch on one replica.

    Args:
        graph: The captured model.
        units: Its units.
        local_batch: Samples of the microbatch.
    """
    if len(graph.ops) >= FEW_OPS and local_batch != graph.global_batch:
        try:
            return _scaled(graph, units, local_batch)
        except (NotEven, CaptureError, RuntimeError):
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
    resize(written, small, large, Scale(graph.global_batch, size))
    clean: CleanGraph = replace(graph.clean, graph=written)
    lay_out_random(clean, graph.analysis, size)
    return written, members
