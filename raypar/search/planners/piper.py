"""Planner `piper`: stages of balanced load, with tensor parallelism and recomputation.

The two-level program of Tarnawski et al. 2021, "Piper: Multidimensional Planner for DNN
Parallelization" (NeurIPS), on a captured model. Its layers are the model's units, their costs those
of the intra-op program's shardings on meshes of every size, their variants the recompute policies.
What differs from the published model: all stages have equally many replicas here, so that those are
part of the outer search with the microbatches and the ZeRO level, and a stage has one recompute
policy: what the program mixes inside a stage is rounded to the fastest policy that fits. The
objective knows nothing of a pipeline's filling, so that the best pipelines are played, under
several schedules, before one is chosen.

Where devices differ, every unit costs what it costs on the slowest mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from raypar.graph.opgraph import OpGraph
from raypar.graph.workloads import Layer, LayerEdge, LayerVariant, LayerWorkload
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.exact.piper import PiperSetting, PiperStage, solve_piper
from raypar.search.interop.pipeline import (
    Pipeline,
    Places,
    Stage,
    Tables,
    Way,
    WayTable,
    best_pipeline,
    tables_of,
)
from raypar.search.interop.space import Split
from raypar.search.interop.ways import WayKey
from raypar.search.planners.alpa import AlpaSearch
from raypar.search.planners.base import Planner, register_planner

_PATIENCE_S = 2.0  # CPU seconds for one program; most take a tenth of one


@register_planner
class PiperPlanner(Planner):
    """Searches stages, tensor-parallel degrees and recomputation for the least largest load."""

    name = "piper"
    obeys_budget = True

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """The fastest of the pipelines found; see `Planner.plan`."""
        return PiperSearch(graph, cluster, config).run()


class PiperSearch(AlpaSearch):
    """Alpa's outer search with Piper's program for the pipeline."""

    planner = PiperPlanner.name

    def _pipelines(self, tables: Tables, split: Split, unit: int) -> Iterator[Pipeline]:
        """The program's pipelines, one for every ZeRO level."""
        exactly = None if self.config.stages == "auto" else self.config.stages
        most = min(self.most_stages, split.devices // min(tables), len(self.bench.units))
        found = False
        for workload, memory in _workloads(tables, split.microbatches):
            setting = PiperSetting(split.devices, memory, exactly or most, bandwidth=2.0)
            # Every stage has the split's replicas: per replica, it has one.
            solved = solve_piper(workload, setting, replicas=[1], seconds=_PATIENCE_S)
            if exactly is not None and len(solved.stages) != exactly:
                continue
            stages = _on_places(solved.stages, tables, unit)
            if stages:
                found = True
                times = [stage.seconds for stage in stages]
                yield Pipeline(tuple(stages), sum(times) + (split.microbatches - 1) * max(times))
        if not found:
            # No policy fits a whole stage of theirs, or the load is least with fewer stages.
            yield best_pipeline(
                tables,
                split.devices,
                split.microbatches,
                unit=unit,
                most_stages=most,
                exactly=exactly,
            )


def _workloads(tables: Tables, microbatches: int) -> Iterator[tuple[LayerWorkload, float]]:
    """The model as a chain of layers, with the bytes of a device, for every ZeRO level.

    Args:
        tables: Devices of a stage → its tables.
        microbatches: M.
    """
    every_table = [table for places in tables.values() for table in tables_of(places)]
    levels = sorted({_key(way).zero for table in every_table for way in table.ways})
    for level in levels:
        chosen = {size: _policies(found, level) for size, found in tables.items()}
        chosen = {size: ways for size, ways in chosen.items() if ways}
        every = [way for ways in chosen.values() for way in ways]
        memory = min(way.memory - float(way.transient.max()) for way in every)
        if memory <= 0:
            continue
        n = len(every[0].seconds)
        layers = tuple(
            Layer(
                unit,
                f"unit {unit}",
                {
                    size: tuple(_variant(way, unit, microbatches) for way in ways)
                    for size, ways in chosen.items()
                },
            )
            for unit in range(n)
        )
        # Both ends of a cut pay for it: with 2 bytes per second, its bytes are its seconds.
        entry = np.min([way.entry for way in every], axis=0)
        edges = tuple(LayerEdge(u, u + 1, float(entry[u + 1])) for u in range(n - 1))
        yield LayerWorkload(layers, edges), memory


def _policies(places: Places, level: int) -> list[Way]:
    """The fastest sharding at a ZeRO level (or the nearest one), with every recompute policy.

    Where places differ, with the most of every figure over all of them.
    """
    tables = tables_of(places)
    first = tables[0]
    nearest = min({_key(way).zero for way in first.ways}, key=lambda zero: abs(zero - level))
    groups: dict[object, list[Way]] = {}
    for way in first.ways:
        key = _key(way)
        if key.zero == nearest:
            groups.setdefault((key.shape, key.modes), []).append(way)
    best = min(groups.values(), key=lambda ways: min(float(w.seconds.sum()) for w in ways))
    return [_slowest(way, tables) for way in best]


def _slowest(way: Way, tables: Sequence[WayTable]) -> Way:
    key = _key(way)
    wanted = (key.shape, key.modes, key.zero, key.recompute)
    alike = [way]
    for table in tables:
        for other in table.ways:
            k = _key(other)
            if (k.shape, k.modes, k.zero, k.recompute) == wanted:
                alike.append(other)
    if len(alike) <= 2:
        return way
    names = ("seconds", "once", "fixed", "saved", "transient", "entry", "held")
    most = {name: np.max([getattr(w, name) for w in alike], axis=0) for name in names}
    return Way(key, min(w.memory for w in alike), **most)


def _variant(way: Way, unit: int, microbatches: int) -> LayerVariant:
    return LayerVariant(
        _key(way).recompute,
        float(way.seconds[unit] + way.once[unit] / microbatches),
        0.0,  # what gradient sums take is part of the seconds
        float(way.saved[unit]),
        float(way.fixed[unit]),
    )


def _on_places(found: Sequence[PiperStage], tables: Tables, unit: int) -> list[Stage]:
    """Stages on their devices, each with its fastest way that fits; none where one has no way."""
    stages: list[Stage] = []
    first = place = 0
    for position, stage in enumerate(found):
        last = first + len(stage.layers)
        places = tables[stage.degree]
        at = 0  # of all places, where they are alike
        if len(places) > 1:  # devices before the next place where a stage may begin stay idle
            later = range(place // unit, len(places))
            at = next((at for at in later if places[at] is not None), len(places))
            place = at * unit
        table = places[at] if at < len(places) else None
        if table is None:
            return []
        time, way = table.at(len(found) - position)
        seconds = float(time[first, last - 1])
        if not np.isfinite(seconds):
            return []
        chosen = table.ways[way[first, last - 1]]
        stages.append(Stage(first, last, stage.degree, place, chosen, seconds))
        first, place = last, place + stage.degree
    return stages


def _key(way: Way) -> WayKey:
    assert isinstance(way.key, WayKey)
    return way.key
