"""Pipelines are the best ones there are; short graphs stand for long ones."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

import raypar as rp
from raypar.search.interop.pipeline import Tables, Way, WayTable, best_pipeline
from raypar.search.interop.units import find_units, shorten
from raypar.testing import models


def _way(rng: random.Random, units: int, size: int, memory: float) -> Way:
    def row(low: float, high: float) -> np.ndarray:
        return np.array([rng.uniform(low, high) for _ in range(units)]) / size

    zero = np.zeros(units)
    return Way(
        size, memory, row(1, 3), row(0, 1), row(1, 2), row(0.1, 0.3), zero, row(0, 0.1), zero
    )


def _brute(tables: Tables, slots: int, microbatches: int) -> float:
    """Every way to cut and to place, one by one."""
    n, best = next(iter(tables.values()))[0].n_units, float("inf")
    for count in range(1, min(n, slots) + 1):
        for cuts in itertools.combinations(range(1, n), count - 1):
            bounds = [0, *cuts, n]
            for places in itertools.combinations(range(slots), count):
                for sizes in itertools.product(tables, repeat=count):
                    ends = [*places[1:], slots]
                    if any(p + z > e for p, z, e in zip(places, sizes, ends, strict=True)):
                        continue
                    times = []
                    for i, (place, size) in enumerate(zip(places, sizes, strict=True)):
                        row = tables[size]
                        table = row[place] if len(row) > 1 else row[0]
                        time = table.at(count - i)[0]
                        times.append(time[bounds[i], bounds[i + 1] - 1])
                    best = min(best, sum(times) + (microbatches - 1) * max(times))
    return float(best)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("memory", [4.0, 9.0, 1e9])
def test_the_pipeline_is_the_best_of_all(unequal: bool, memory: float) -> None:
    rng = random.Random(f"{unequal} {memory}")
    for microbatches in (1, 8):
        slots = 4
        tables = {
            size: [
                WayTable([_way(rng, 5, size, memory)] * 2, microbatches)
                for _ in range(slots if unequal else 1)
            ]
            for size in (1, 2, 4)
        }
        found = best_pipeline(tables, slots, microbatches, unit=1, most_stages=slots)
        assert found.step_s == pytest.approx(_brute(tables, slots, microbatches), rel=5e-3)
        taken = [d for s in found.stages for d in range(s.place, s.place + s.devices)]
        assert len(set(taken)) == len(taken)
        assert all(d < slots for d in taken)


def test_without_memory_there_is_no_pipeline() -> None:
    table = WayTable([_way(random.Random(0), 4, 1, 0.5)], 4)
    assert not best_pipeline({1: [table]}, 4, 4, unit=1, most_stages=4).stages


@pytest.mark.parametrize("unequal", [False, True])
def test_sizes_that_are_no_multiples_of_the_smallest_share_no_device(unequal: bool) -> None:
    """Nodes of 6 devices give stages of 4 and of 6: places are counted in what divides both."""
    rng = random.Random(f"{unequal}")
    for devices, sizes in ((6, (2, 3)), (7, (2, 3)), (9, (2, 3, 9)), (8, (3, 4))):
        tables = {
            size: [WayTable([_way(rng, 4, size, 9.0)], 4) for _ in range(devices if unequal else 1)]
            for size in sizes
        }
        found = best_pipeline(tables, devices, 4, unit=1, most_stages=devices)
        assert found.step_s == pytest.approx(_brute(tables, devices, 4), rel=5e-3)
        taken = [d for s in found.stages for d in range(s.place, s.place + s.devices)]
        assert len(set(taken)) == len(taken)
        assert all(d < devices for d in taken)


def test_places_may_be_counted_in_whatever_divides_every_size() -> None:
    rng = random.Random(0)
    tables = {size: [WayTable([_way(rng, 6, size, 9.0)], 4)] for size in (4, 6)}
    one, two = (best_pipeline(tables, 24, 4, unit=unit, most_stages=6) for unit in (1, 2))
    assert one.stages
    assert one == two


@pytest.mark.parametrize("name", ["gpt", "t5", "unet", "albert", "hf_llama"])
def test_a_short_graph_stands_for_every_unit(name: str) -> None:
    case = models.case(name)
    graph = rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)
    units = find_units(graph)
    assert units.bounds[0] == 0
    assert units.bounds[-1] == len(graph.ops)
    assert set(units.bounds[1:-1]) <= set(graph.cuts)
    short, members = shorten(graph.clean, units)
    for unit, twin in enumerate(units.twin):
        ops = graph.ops[units.bounds[unit] : units.bounds[unit + 1]]
        assert [n.target for n in members[twin]] == [
            n.target for n in graph.clean.ops[units.bounds[unit] : units.bounds[unit + 1]]
        ]
        assert [
            tuple(n.meta["val"].shape) for n in members[twin] if hasattr(n.meta["val"], "shape")
        ] == [
            op.shapes[0]
            for op, n in zip(ops, members[twin], strict=True)
            if hasattr(n.meta["val"], "shape")
        ]
    assert sum(units.weight(u) for u in units.kept) == len(units)
    assert len(units) <= 128
    fewest = min(len(units) + 3, len(graph.cuts) + 1)
    assert fewest <= len(find_units(graph, least=fewest)) <= len(graph.cuts) + 1
    short.lint()
