"""Planner alpa where clusters, options and models are odd: unequal nodes, spare devices, frozen."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cache
from typing import Any

import pytest

import raypar as rp
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DeviceKind, Link, device_kind
from raypar.search.interop import shardings
from raypar.search.interop.space import Split
from raypar.search.interop.ways import Wish
from raypar.search.intra.planner import OutOfTimeError
from raypar.search.planners.alpa import AlpaSearch
from raypar.search.simulate import simulate
from raypar.testing import models, random_plan

NEAR, FAR = Link(1e13, 1e-9), Link(1e5, 1e-2)


def slow(name: str, rate: float = 1e6, memory: int = 16 << 30, across: Link = NEAR) -> DeviceKind:
    """A device so slow that even small models are worth spreading."""
    base = device_kind("A100-40GB")
    return dataclasses.replace(
        base,
        name=name,
        flops=dict.fromkeys(base.flops, rate),
        bandwidth=rate,
        memory=memory,
        inside=NEAR,
        host=NEAR,
        across=across,
    )


def nodes(*kinds: tuple[DeviceKind, int]) -> Cluster:
    """A cluster with a node for every (kind, devices)."""
    return Cluster(tuple(Node.of(k, n, name=f"node{i}") for i, (k, n) in enumerate(kinds)))


@cache
def captured(name: str, samples: int = 8) -> OpGraph:
    """A model of the zoo."""
    case = models.case(name)
    return rp.capture(case.model_fn, case.batch(0, samples), case.loss_fn, case.batch_dims)


def alpa(cluster: Cluster, samples: int = 8, **options: Any) -> rp.Plan:
    """The plan that alpa finds."""
    config = rp.SearchConfig(planner="alpa", zero=0, recompute="none", **options)
    return rp.plan(captured("mlp", samples), cluster, config)


def test_a_stage_stays_inside_a_node_where_nodes_are_far_apart() -> None:
    far = slow("far", across=FAR)
    for cluster, node in ((nodes((far, 4), (far, 1)), 0), (nodes((far, 1), (far, 4)), 1)):
        plan = alpa(cluster, replicas=1, microbatches=2)
        wide = [s.mesh.devices for s in plan.stages if len(s.mesh.devices) > 1]
        assert wide
        for devices in wide:
            assert {cluster.device(d)[0] for d in devices} == {node}


def test_spare_devices_are_the_last_ones() -> None:
    plan = alpa(nodes((slow("one"), 3)), samples=1)
    assert plan.devices == tuple(range(len(plan.devices)))


@pytest.mark.parametrize("tensor", [1, 3])
def test_every_stage_has_as_many_devices_as_tensor_says(tensor: int) -> None:
    plan = alpa(nodes((slow("one"), 6)), tensor=tensor, microbatches=2)
    assert {math.prod(n for _, n in s.mesh.inner) for s in plan.stages} == {tensor}


def test_ways_are_those_of_the_devices_that_a_stage_gets() -> None:
    small, large = slow("small", memory=8 << 30), slow("large", memory=16 << 30)
    cluster = nodes((small, 9), (large, 9))
    config = rp.SearchConfig(
        planner="alpa", replicas=1, microbatches=2, zero=0, recompute="none", memory_fraction=1.0
    )
    search = AlpaSearch(captured("mlp"), cluster, config)
    sizes = set()
    for kept in search.search():
        for stage in kept.pipeline.stages:
            own = search.bench.line[stage.place : stage.place + stage.devices]
            limit = min(cluster.memory(d) for d in own)
            assert limit / 2 < stage.way.memory <= limit
            sizes.add(stage.devices)
    assert max(sizes) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunks": 2}, "search.planner: uniform"),
        ({"replicas": 2, "tensor": 4}, "need 8 devices, the cluster has 6"),
        ({"microbatches": 0}, "at least 1"),
        ({"planner": "uniform", "microbatches": 0, "tensor": 2}, "at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    config = rp.SearchConfig(**{"planner": "alpa", **options})
    with pytest.raises(PlanError, match=words):
        rp.plan(captured("mlp"), nodes((slow("one"), 6)), config)


@pytest.mark.thorough  # sizes that depend on data are in tests/graph and tests/programs
def test_a_model_whose_sizes_depend_on_its_data_is_sharded() -> None:
    graph = captured("moe_sparse")
    config = rp.SearchConfig(planner="alpa", zero=0, recompute="none", stages=1, microbatches=1)
    plan = rp.plan(graph, nodes((slow("one"), 2)), config)
    check_plan(plan, graph)
    assert plan.stages[0].sharding


def test_a_stage_of_frozen_parameters_alone_can_be_simulated() -> None:
    graph = captured("partly_frozen")
    plan = random_plan(graph, Cluster.local(3), seed=0, stages=3, replicas=1, microbatches=2)
    first = simulate(graph, plan, Cluster.local(3)).setting.costs[0]
    assert first.forward_s > 0
    assert first.backward_s == 0
    assert first.forward_peak_bytes > 0


def test_a_search_whose_time_is_over_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    real = AlpaSearch._try

    def counted(self: AlpaSearch, split: Any, sizes: Any, wish: Any) -> None:
        tried.append(split)
        real(self, split, sizes, wish)

    monkeypatch.setattr(AlpaSearch, "_try", counted)
    cluster = nodes((slow("one"), 4))
    whole = alpa(cluster)
    count = len(tried)
    tried.clear()
    hasty = alpa(cluster, budget_s=1e-9)
    assert len(tried) == 1 < count
    assert hasty.predicted["step_s"] >= whole.predicted["step_s"]


def test_a_second_search_without_time_begins_with_the_best_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With less memory: what is otherwise tried first may fit, and be far slower."""
    tried: list[tuple[Split, int | None, list[int]]] = []
    real = AlpaSearch._try

    def noted(self: AlpaSearch, split: Any, sizes: Any, wish: Any) -> None:
        solved: list[int] = []
        tables = self.bench.tables

        def counted(of: Split, size: int, unit: int, wish: Wish) -> Any:
            if wish.until > time.perf_counter():  # else only what is solved is told
                solved.append(size)
            return tables(of, size, unit, wish)

        with monkeypatch.context() as patch:
            patch.setattr(self.bench, "tables", counted)
            real(self, split, sizes, wish)
        tried.append((split, wish.axes, solved))

    monkeypatch.setattr(AlpaSearch, "_try", noted)
    search = AlpaSearch(captured("gpt"), nodes((slow("one"), 4)), rp.SearchConfig())
    search.search()
    # Not the one that every search begins with, nor of the smallest microbatches.
    best = [c for c in search.kept if c.split.local_batch > 1][-1]
    sizes = {stage.devices for stage in best.pipeline.stages}
    assert best.split != tried[0][0]
    tried.clear()
    search.kept, search._deadline = [best], 0.0
    search._plans(0.9)
    (split, axes, solved), *rest = tried
    assert split == best.split
    assert (axes, set(solved)) == (1, sizes)
    # Smaller microbatches hold less; besides, only what is solved over two axes is read again.
    others = [other for other, _, _ in rest]
    assert [solved for _, axes, solved in rest if axes is None]
    assert not any(solved for _, axes, solved in rest if axes is None)
    assert all(s.replicas == split.replicas and s.local_batch <= split.local_batch for s in others)
    assert any(s.local_batch < split.local_batch for s in others)
    assert search.kept[0].split in [split, *others]


def test_meshes_with_two_axes_are_tried_last_from_the_best_microbatches_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[tuple[int | None, int]] = []
    real = AlpaSearch._try

    def noted(self: AlpaSearch, split: Any, sizes: Any, wish: Any) -> None:
        tried.append((wish.axes, split.local_batch))
        real(self, split, sizes, wish)

    monkeypatch.setattr(AlpaSearch, "_try", noted)
    config = rp.SearchConfig(planner="alpa", zero=0, recompute="none")
    search = AlpaSearch(captured("mlp"), nodes((slow("one"), 4)), config)
    kept = search.search()
    lines = [size for axes, size in tried if axes == 1]
    grids = [size for axes, size in tried if axes is None]
    assert tried == [(1, size) for size in lines] + [(None, size) for size in grids]
    assert lines == sorted(lines)
    assert grids
    assert len({(c.split, c.step_s) for c in kept}) == len(kept)
    tried.clear()
    AlpaSearch(captured("mlp"), nodes((slow("one"), 2)), config).search()
    assert {axes for axes, _ in tried} == {1}
    tried.clear()
    one_size = dataclasses.replace(config, replicas=1, microbatches=2)
    AlpaSearch(captured("mlp"), nodes((slow("one"), 4)), one_size).search()
    assert tried == [(None, 4)]


def test_a_mesh_whose_program_takes_too_long_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve = shardings.plan_intra

    def hasty(graph: Any, machine: Any, settings: Any) -> Any:
        if len(machine.mesh.inner) == 2:
            raise OutOfTimeError("no time")
        return solve(graph, machine, settings)

    graph = captured("mlp")
    monkeypatch.setattr(graph, "memo", {})
    monkeypatch.setattr(shardings, "plan_intra", hasty)
    config = rp.SearchConfig(planner="alpa", zero=0, recompute="none")
    cluster = nodes((slow("one"), 4))
    check_plan(AlpaSearch(graph, cluster, config).run(), graph, cluster)


def test_of_splits_that_promise_the_same_one_replica_comes_first_where_memory_is_tight() -> None:
    graph = captured("mlp")
    orders = []
    for memory in (16 << 30, 40_000):
        cluster = nodes((slow("one", memory=memory), 4))
        search = AlpaSearch(graph, cluster, rp.SearchConfig(planner="alpa", memory_fraction=1.0))
        many, one = Split(4, 2, 1, 1), Split(1, 8, 1, 4)
        order = sorted([(1.0, many), (1.01, one)], key=lambda p: search._turn(p[1], p[0]))
        orders.append([split for _, split in order])
        far = sorted([(1.0, many), (1.5, one)], key=lambda p: search._turn(p[1], p[0]))
        assert [split for _, split in far] == [many, one]
    assert orders == [[many, one], [one, many]]
