"""What alpa leaves out without looking cannot win, and unequal devices get unequal stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture, plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DEVICES
from raypar.search.config import SearchConfig
from raypar.search.interop.pipeline import Places, best_pipeline
from raypar.search.interop.space import Split, line_of_devices
from raypar.search.interop.ways import Wish
from raypar.search.interop.workbench import Workbench
from raypar.search.planners import alpa
from raypar.search.planners.alpa import AlpaSearch

A100, L4 = DEVICES["A100-80"], DEVICES["L4"]


def _graph(layers: int = 6, width: int = 8192, batch: int = 65536) -> OpGraph:
    def model() -> nn.Module:
        parts = [[nn.Linear(width, width), nn.GELU()] for _ in range(layers)]
        return nn.Sequential(*[nn.Sequential(*two) for two in parts]).half()

    rows = torch.zeros(1, width, dtype=torch.half).expand(batch, -1)
    return capture(model, (rows, torch.zeros(batch, dtype=torch.long)), F.cross_entropy)


def _cluster(*kinds: tuple[str, float], devices: int = 2) -> Cluster:
    nodes = [
        Node.of(DEVICES[name].at_speed(speed), devices, name=f"node{i}")
        for i, (name, speed) in enumerate(kinds)
    ]
    return Cluster(tuple(nodes))


@pytest.mark.parametrize(
    "cluster",
    [_cluster(("A100-80", 1), ("A100-80", 1)), _cluster(("A100-80", 1), ("A100-80", 0.25))],
    ids=["alike", "unlike"],
)
def test_no_pipeline_goes_below_the_bound(cluster: Cluster) -> None:
    search = AlpaSearch(
        _graph(), cluster, SearchConfig(microbatches=16), table_calibration(cluster)
    )
    search.search()
    assert search.kept
    for candidate in search.kept:
        sizes = {stage.devices for stage in candidate.pipeline.stages}
        least = min(search.bench.least_step_s(candidate.split, size) for size in sizes)
        assert 0 < least <= candidate.step_s * (1 + 1e-9)


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_stages_of_several_sizes_are_timed_on_their_own_devices(
    monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr(alpa, "MIXED_SLOTS", slots)
    cluster = _cluster(("A100-80", 1), ("A100-80", 0.25), devices=4)
    search = AlpaSearch(_graph(), cluster, SearchConfig(zero=0), table_calibration(cluster))
    split = Split(1, 16, 4096, 8)
    wish = Wish(recompute="none", axes=1)
    tables = {n: search.bench.tables(split, n, 1, wish) for n in (1, 2, 4)}
    families = search._families(tables, split, 1)
    assert {frozenset(family) for _, family in families} == {
        2: {frozenset({1}), frozenset({2}), frozenset({4})},  # one size mixes with none
        4: {frozenset({1}), frozenset({2}), frozenset({4}), frozenset({2, 4})},
        8: {frozenset({1, 2, 4})},
    }[slots]
    for unit, family in families:
        found = best_pipeline(family, 8, 16, unit=unit, most_stages=8).stages
        assert found
        for index, stage in enumerate(found):
            table = search.bench.tables(split, stage.devices, 1, wish)[stage.place]
            assert table is not None
            seconds, _ = table.at(len(found) - index)
            assert stage.seconds == seconds[stage.first, stage.last - 1]


@pytest.mark.parametrize("planner", ["alpa", "piper"])
@pytest.mark.parametrize("unlike", [True, False])
def test_nodes_of_three_devices_are_planned(planner: str, unlike: bool) -> None:
    """A stage of three beside stages of two: neither is a multiple of the other."""
    kinds = [("A100-80", 1), ("A100-80", 0.5 if unlike else 1)] * 3
    cluster = _cluster(*kinds, devices=3)
    config = SearchConfig(planner=planner, microbatches=8, replicas=1, zero=0)
    found = plan(_graph(layers=4, width=1024, batch=4608), cluster, config)
    taken = [d for stage in found.stages for d in stage.mesh.devices]
    assert len(set(taken)) == len(taken) > 6


def test_stages_begin_where_nodes_and_multiples_of_their_size_do() -> None:
    unlike = ("A100-80", 1), ("A100-80", 0.25), ("A100-80", 1), ("A100-80", 1)
    cluster = _cluster(*unlike, devices=4)
    bench = Workbench(_graph(), cluster, SearchConfig(zero=0), table_calibration(cluster))
    wish = Wish(recompute="none", axes=1)

    def open_at(replicas: int, size: int) -> list[int]:
        split = Split(replicas, 16, 4096, 16 // replicas)
        places = bench.tables(split, size, 1, wish)
        assert len(places) == split.devices
        return [at for at, table in enumerate(places) if table is not None]

    assert open_at(1, 2) == [at for at in range(15) if at % 4 != 3]
    assert open_at(1, 4) == [0, 4, 8, 12]
    assert open_at(1, 8) == [0, 4, 8]
    assert open_at(2, 4) == [0, 2, 4]
    # Three devices fill no node: besides lying within one, they begin at multiples of three.
    assert open_at(1, 3) == [0, 1, 3, 4, 5, 6, 8, 9, 12, 13]
    line = bench.line[2:]  # the first node of this line lacks devices
    split = Split(1, 16, 4096, 14)
    places = bench.tables(split, 4, 1, wish, line)
    assert [at for at, table in enumerate(places) if table is not None] == [0, 2, 4, 6, 8, 10]


def test_where_devices_differ_the_most_promising_microbatches_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promised = {1: 9.0, 2: 5.0, 4: 2.02, 8: 2.0, 16: 2.3}
    monkeypatch.setattr(
        Workbench, "least_step_s", lambda self, split, *_: promised[split.local_batch]
    )
    cluster = _cluster(("A100-80", 1), ("A100-80", 0.25))
    bench = Workbench(_graph(), cluster, SearchConfig(), table_calibration(cluster))
    by_size = {n: [Split(1, 65536 // n, n, 4)] for n in promised}
    assert bench.by_promise(by_size) == [4, 8, 16, 2, 1]
    # What lies close together stays together, wherever other promises lie.
    promised |= {1: 3.03, 2: 3.02, 4: 3.01}
    assert bench.by_promise(by_size) == [8, 16, 1, 2, 4]
    promised = dict.fromkeys(promised, 0.0)
    assert bench.by_promise(by_size) == sorted(promised)
    tried: list[int] = []
    monkeypatch.setattr(AlpaSearch, "_try", lambda self, split, *_: tried.append(split.local_batch))
    promised = {2**k: float(abs(k - 13)) + 1 for k in range(17)}
    config = SearchConfig(replicas=1)
    AlpaSearch(_graph(), cluster, config, table_calibration(cluster)).search()
    assert tried[0] == 1 << 13


def test_a_slow_node_is_not_the_pace_of_all() -> None:
    graph = _graph()
    mixed = _cluster(("A100-80", 1), ("A100-80", 0.25))
    slow = _cluster(("A100-80", 0.25), ("A100-80", 0.25))
    best = [
        AlpaSearch(
            graph, cluster, SearchConfig(microbatches=16), table_calibration(cluster)
        ).search()[0]
        for cluster in (mixed, slow)
    ]
    assert best[0].step_s < 0.75 * best[1].step_s


def test_devices_with_most_memory_stand_first() -> None:
    cluster = Cluster((Node.of(L4, 2, name="a"), Node.of(A100, 1, name="b")))
    assert line_of_devices(cluster) == [2, 0, 1]


def test_a_search_with_less_memory_reads_what_is_solved_once_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = _cluster(("A100-80", 1), ("A100-80", 0.25), devices=4)
    config = SearchConfig(microbatches=16)
    search = AlpaSearch(_graph(), cluster, config, table_calibration(cluster))
    best, *_ = search.search()
    solved = search.bench.maker.solved
    axes: set[int | None] = set()
    real = Workbench.tables

    def noted(
        self: Workbench, split: Split, size: int, unit: int, wish: Wish, *rest: Any
    ) -> Places:
        assert split == best.split
        axes.add(wish.axes)
        return real(self, split, size, unit, wish, *rest)

    monkeypatch.setattr(Workbench, "tables", noted)
    search._deadline, search._before, search.kept = 0.0, best, []
    again, *_ = search.search()
    assert again.step_s == best.step_s
    assert axes == {1, None}
    assert search.bench.maker.solved == solved
