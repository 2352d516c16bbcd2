"""A model's units as an operator graph for device placement.

The placement problem of `raypar.search.exact.placement_problem` with units of the model as items,
rank groups of one kind as accelerators and no CPUs: what an item takes is one microbatch's forward
and backward on a rank group, a tensor costs its message forward and its gradient's back, and a
parameter that several units read costs its gradient's way to the others.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping

import numpy as np
import torch

from raypar.graph.opgraph import OpGraph
from raypar.search.cost.machine import p2p_s
from raypar.search.exact.placement_problem import PlacementProblem
from raypar.search.interop.pipeline import Way
from raypar.search.interop.space import Split
from raypar.search.interop.workbench import Workbench

_PARAM = "param:"


def unit_problem(
    bench: Workbench, split: Split, way: Way, groups: int, size: int
) -> PlacementProblem:
    """The problem of placing a model's units.

    Args:
        bench: The model on the cluster.
        split: How the batch is cut.
        way: How a rank group runs any unit.
        groups: How many rank groups there are.
        size: Devices of one of them in one replica.
    """
    units = len(bench.units)
    tensors = _tensors(bench, split, size)
    in_flight = min(split.microbatches, groups)  # of 1F1B in the first of so many stages
    before = {
        (readers[0], reader)
        for readers, is_flow in _readers(bench.graph, bench.units.bounds)
        if is_flow
        for reader in readers[1:]
    }
    return PlacementProblem(
        accelerators=groups,
        cpus=0,
        memory=way.memory - float(way.transient.max()),
        accelerator_s=way.seconds + way.once / split.microbatches,
        cpu_s=np.zeros(units),  # there are no CPUs
        size=way.fixed + way.saved * in_flight,
        only_cpu=np.zeros(units, dtype=np.bool_),
        tensors=tuple(tensors),
        cost=np.array(list(tensors.values()), dtype=np.float64),
        before=frozenset(before),
        members=tuple((unit,) for unit in range(units)),
    )


def _readers(graph: OpGraph, bounds: tuple[int, ...]) -> dict[tuple[tuple[int, ...], bool], float]:
    """(units, whether a value flows from the first to the others) → bytes at the global batch.

    Values that a stage makes itself, and what every rank is given, do not cross borders.
    """
    touching: dict[str, set[int]] = {}
    for at, op in enumerate(graph.ops):
        unit = bisect.bisect_right(bounds, at) - 1
        for key in op.inputs:
            touching.setdefault(key, set()).add(unit)
    found: dict[tuple[tuple[int, ...], bool], float] = {}
    for key, units in touching.items():
        source = graph.index.get(key)
        if source is not None:
            if key in graph.cloneable or key in graph.analysis.globals:
                continue
            maker = bisect.bisect_right(bounds, source) - 1
            ends = (maker, *sorted(units - {maker}))
            nbytes = float(graph.ops[source].out_bytes)
        elif key.startswith(_PARAM):
            shape, dtype, trained = graph.params[key.removeprefix(_PARAM)]
            if not trained:
                continue
            ends, nbytes = tuple(sorted(units)), _param_bytes(shape, dtype)
        else:
            continue
        if len(ends) > 1:
            kind = (ends, source is not None)
            found[kind] = found.get(kind, 0.0) + nbytes
    return found


def _param_bytes(shape: tuple[int, ...], dtype: str) -> float:
    itemsize: int = getattr(torch, dtype.removeprefix("torch.")).itemsize
    return float(math.prod(shape) * itemsize)


def _tensors(bench: Workbench, split: Split, size: int) -> Mapping[tuple[int, ...], float]:
    """Units of every tensor → seconds that it costs a rank group at its border."""
    latency, per_byte = _link(bench, split.replicas * size)
    share = split.local_batch / bench.graph.global_batch
    found: dict[tuple[int, ...], float] = {}
    for (ends, is_flow), nbytes in _readers(bench.graph, bench.units.bounds).items():
        once = 1.0 if is_flow else 1.0 / split.microbatches
        there = nbytes * (share if is_flow else 1.0) / size
        units = tuple(sorted(ends))
        found[units] = found.get(units, 0.0) + 2 * once * (latency + there * per_byte)
    return found


def _link(bench: Workbench, width: int) -> tuple[float, float]:
    """(latency, seconds per byte) from the first rank group to its neighbour."""
    if bench.cluster.n_devices <= width:
        return 0.0, 0.0
    a, b = bench.line[width - 1], bench.line[width]
    latency = p2p_s(bench.cluster, a, b, 0, bench.calibration)
    megabyte = p2p_s(bench.cluster, a, b, 1 << 20, bench.calibration)
    return latency, (megabyte - latency) / (1 << 20)
