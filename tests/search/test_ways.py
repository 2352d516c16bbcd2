"""Ways to run units on a mesh: where memory is tight, also those that store the least."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DeviceKind, device_kind
from raypar.search.config import SearchConfig
from raypar.search.interop.pipeline import Way, tables_of
from raypar.search.interop.shardings import LEAN
from raypar.search.interop.space import Split
from raypar.search.interop.ways import WayKey, Wish
from raypar.search.interop.workbench import Workbench

WIDTH, LAYERS, SAMPLES, DEVICES, MICROBATCHES = 1024, 6, 8192, 4, 128


def _graph() -> OpGraph:
    def model() -> nn.Module:
        parts = [[nn.Linear(WIDTH, WIDTH), nn.GELU()] for _ in range(LAYERS)]
        return nn.Sequential(*[nn.Sequential(*two) for two in parts]).half()

    rows = torch.zeros(1, WIDTH, dtype=torch.half).expand(SAMPLES, -1)
    return capture(model, (rows, torch.zeros(SAMPLES, dtype=torch.long)), F.cross_entropy)


SPLIT = Split(1, MICROBATCHES, SAMPLES // MICROBATCHES, DEVICES)


def _bench(*kinds: DeviceKind) -> Workbench:
    nodes = [Node.of(kind, DEVICES, name=f"node{i}") for i, kind in enumerate(kinds)]
    cluster = Cluster(tuple(nodes))
    config = SearchConfig(zero=0, recompute="none", memory_fraction=1.0)
    return Workbench(_graph(), cluster, config, table_calibration(cluster))


def _ways(memory: int) -> dict[str, Way]:
    """Mode → the way without ZeRO and recomputation, over one axis of all devices."""
    bench = _bench(dataclasses.replace(device_kind("L4"), memory=memory))
    found = bench.maker.ways(SPLIT, DEVICES, bench.line)
    keys = [(way, cast(WayKey, way.key)) for way in found]
    return {key.modes[0]: way for way, key in keys if len(key.shape) == 1}


def test_where_memory_is_tight_some_ways_store_less() -> None:
    tight = _ways(memory=1 << 26)
    lean, fastest = tight[LEAN], tight["free"]
    assert lean.fixed.sum() < fastest.fixed.sum() / 2
    assert lean.seconds.sum() > fastest.seconds.sum()


def test_where_there_is_room_no_way_has_to_be_lean() -> None:
    assert set(_ways(memory=64 << 30)) == {"free", "tensor"}


def test_once_time_is_over_only_solved_programs_are_told() -> None:
    bench = _bench(device_kind("L4"))

    def shapes(wish: Wish) -> list[tuple[int, ...]]:
        return [cast(WayKey, w.key).shape for w in bench.maker.ways(SPLIT, 4, bench.line, wish)]

    assert shapes(Wish(until=0.0)) == []
    assert set(shapes(Wish(axes=1))) == {(4,)}
    assert set(shapes(Wish(until=0.0))) == {(4,)}
    assert set(shapes(Wish())) == {(4,), (2, 2)}
    assert set(shapes(Wish(until=0.0))) == {(4,), (2, 2)}


@pytest.mark.parametrize(("nodes", "programs"), [(2, 5), (1, 6)], ids=["many", "few"])
def test_programs_of_two_axes_are_solved_for_the_first_of_many_unlike_devices(
    nodes: int, programs: int
) -> None:
    fast, slow = device_kind("A100-80"), device_kind("L4")
    bench = _bench(*[fast] * nodes, *[slow] * nodes)
    assert not bench.alike
    seconds = []
    for first in (0, nodes * DEVICES):
        devices = bench.line[first : first + DEVICES]
        found = bench.maker.ways(SPLIT, DEVICES, devices)
        seconds.append([w.seconds.sum() for w in found if len(cast(WayKey, w.key).shape) == 2])
        assert bench.maker.solved == (3 if first == 0 else programs)
    assert seconds[0]
    assert all(fast < slow for fast, slow in zip(*seconds, strict=True))


def test_a_table_that_is_begun_in_time_has_a_way_at_every_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = _bench(device_kind("A100-80"), device_kind("L4"))
    real, ends = bench.maker.ways, time.perf_counter() + 1e3

    def slowly(split: Split, size: int, devices: Any, wish: Wish) -> list[Way]:
        found = real(split, size, devices, wish)
        monkeypatch.setattr(time, "perf_counter", lambda: ends + 1)  # over with the first place
        return found

    monkeypatch.setattr(bench.maker, "ways", slowly)
    split = Split(1, MICROBATCHES, SAMPLES // MICROBATCHES, 2 * DEVICES)
    places = bench.tables(split, DEVICES, DEVICES, Wish(axes=1, until=ends))
    assert len(tables_of(places)) == 2
    assert not bench.tables(split, 2, 2, Wish(axes=1, until=ends))  # begun too late
