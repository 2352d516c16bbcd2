"""Ladders: what a size stands for, what is carried upwards, and that files give it back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raypar.errors import ConfigError, PlanError
from raypar.fit import check_plan
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import device_kind
from raypar.search.config import SearchConfig
from raypar.search.ladder import Ladder, ladder, part_of, sizes_of
from raypar.search.plan import Found
from raypar.search.planners.uniform import UniformPlanner
from raypar.search.record import INTERRUPTED, SearchRecord
from raypar.search.simulate import simulate

CLUSTER = Cluster.virtual(2, 3)


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())

    return capture(build, torch.randn(12, 8), lambda out: out.sum())


class Searches:
    """A search whose step times are given; where there is none, it finds no plan."""

    def __init__(self, times: dict[int, float | None], interrupt: int = 0) -> None:
        self.times, self.interrupt, self.asked = times, interrupt, list[int]()

    def __call__(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Found:
        size = cluster.n_devices
        self.asked.append(size)
        step_s = self.times[size]
        if step_s is None:
            if size == self.interrupt:
                raise KeyboardInterrupt
            raise PlanError(f"nothing fits on {size}")
        options = SearchConfig(stages=1, replicas=1 if size in (1, 5) else 2, microbatches=1)
        made = UniformPlanner().plan(graph, cluster, options)
        made = dataclasses.replace(
            made, predicted={"step_s": step_s}, certificate={"lower_bound_s": 0.5, "gap": 1.0}
        )
        stopped = INTERRUPTED if size == self.interrupt else "all trials were made"
        return Found(made, SearchRecord("x", "", 0, (), -1, 0.0, stopped=stopped))


def test_a_size_is_whole_nodes_first_and_then_a_part_of_the_next() -> None:
    big = Node.of("A100", 4, name="a", host_memory=64 << 30)
    cpu = Node.of("CPU", 8, name="b", host_memory=32 << 30)
    mixed = Cluster((big, cpu), "mixed")
    assert [part_of(mixed, n).shape for n in (1, 4, 5, 12)] == [(1,), (4,), (4, 1), (4, 8)]
    part = part_of(mixed, 6)
    assert [node.name for node in part.nodes] == ["a", "b"]
    assert part.memory(5) == mixed.memory(5)  # a core's share of its node stays what it was
    for n in (0, 13):
        with pytest.raises(ConfigError, match=r"has 12 devices .* take 1 to 12"):
            part_of(mixed, n)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_smaller_part_is_the_beginning_of_a_larger_one(
    counts: list[int], data: st.DataObject
) -> None:
    cluster = Cluster(tuple(Node.of("A100", n, name=f"n{i}") for i, n in enumerate(counts)))
    n = data.draw(st.integers(1, cluster.n_devices))
    m = data.draw(st.integers(n, cluster.n_devices))
    small, large = part_of(cluster, n), part_of(cluster, m)
    assert small.n_devices == n
    assert small.shape[:-1] == large.shape[: len(small.shape) - 1]
    assert [small.device(i) for i in range(n)] == [large.device(i) for i in range(n)]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4", (4,)),
        ("2..5", (2, 3, 4, 5)),
        ("2..16:4", (2, 6, 10, 14)),
        ("8,2, 4", (2, 4, 8)),
        ("1..3,3,16", (1, 2, 3, 16)),
    ],
)
def test_sizes_as_people_write_them(text: str, sizes: tuple[int, ...]) -> None:
    assert sizes_of(text, 16) == sizes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0..4", ["0 devices are asked for", "sizes from 1 to 16"]),
        ("8..2", ["counts down", "give 2..8"]),
        ("a", ["'a' is no size", "2..16:2", "2,4,8"]),
        ("", ["'' is no size"]),
        ("2,,4", ["'' is no size"]),
        ("-2", ["'-2' is no size"]),
        ("2..", ["'2..' is no size"]),
        ("2.5", ["'2.5' is no size"]),
        ("2..8:0", ["a step of 0", "1 or more"]),
        ("2..17", ["17 devices are asked for, the cluster has 16", "--ladder 2..16"]),
    ],
)
def test_what_is_no_ladder_is_told(text: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes_of(text, 16)
    for part in told:
        assert part in str(caught.value)


def test_more_devices_are_never_slower(graph: OpGraph) -> None:
    searches = Searches({1: 4.0, 2: 2.0, 3: 3.0, 4: None, 5: 1.0, 6: 1.5})
    made = ladder(graph, CLUSTER, range(1, 7), search=searches)
    assert searches.asked == [1, 2, 3, 4, 5, 6]
    assert [rung.step_s for rung in made.rungs] == [4.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    assert [rung.carried_from for rung in made.rungs] == [0, 0, 2, 2, 0, 5]
    for rung in made.rungs:
        assert rung.plan is not None
        check_plan(rung.plan, graph, part_of(CLUSTER, rung.devices))
    third, fourth = made.rungs[2:4]
    assert third.plan is not None
    assert third.plan.certificate == {"lower_bound_s": 0.5, "gap": 3.0}
    assert fourth.plan is not None
    assert not fourth.plan.certificate
    assert "nothing fits on 4" in fourth.reason


def test_the_best_for_a_number_of_devices_is_the_largest_that_fits(graph: OpGraph) -> None:
    made = ladder(graph, CLUSTER, (1, 2, 4), search=Searches({1: None, 2: 2.0, 4: 1.0}))
    for devices, wanted in ((2, 2), (3, 2), (4, 4), (9, 4)):
        assert sum(made.best_for(devices).cluster) == wanted
    with pytest.raises(
        PlanError, match=r"1 devices or fewer: the smallest plan is for 2.*ladder 1"
    ):
        made.best_for(1)
    nothing = ladder(graph, CLUSTER, (1,), search=Searches({1: None}))
    with pytest.raises(PlanError, match="it has no plan"):
        nothing.best_for(8)


def test_a_ladder_is_shown_size_by_size(graph: OpGraph) -> None:
    made = ladder(graph, CLUSTER, (1, 2, 5, 6), search=Searches({1: None, 2: 2.0, 5: 1.0, 6: 3.0}))
    head, two, five, six, none = made.text().splitlines()
    assert head.split() == ["devices", "step", "samples/s", "efficiency", "plan"]
    assert two.split()[:5] == ["2", "2", "s", "6", "100%"]
    assert five.split()[:5] == ["5", "1", "s", "12", "80%"]
    assert "(that for 5 devices)" in six
    assert none == "1 devices: no plan: nothing fits on 1"


def test_files_give_the_ladder_back(graph: OpGraph, tmp_path: Path) -> None:
    made = ladder(graph, CLUSTER, (1, 2, 3), search=Searches({1: None, 2: 2.0, 3: 3.0}))
    path = made.save(tmp_path / "deep" / "folder")
    assert Ladder.load(path.parent) == made
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "ladder.json",
        "plan-2.json",
        "plan-3.json",
    ]
    index = json.loads(path.read_text())
    assert [entry["step_s"] for entry in index["sizes"]] == [None, 2.0, 2.0]
    assert [entry["file"] for entry in index["sizes"]] == [None, "plan-2.json", "plan-3.json"]
    assert index["sizes"][1]["samples_per_s"] == 6.0
    assert index["sizes"][1]["certificate"] == {"lower_bound_s": 0.5, "gap": 1.0}


def test_a_folder_without_a_ladder_is_told(graph: OpGraph, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read ladder .*No such file"):
        Ladder.load(tmp_path)
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(PlanError, match="is no ladder"):
        Ladder.load(tmp_path)
    made = ladder(graph, CLUSTER, (2,), search=Searches({2: 2.0}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the ladder"):
        made.save(tmp_path / "file")
    path = made.save(tmp_path)
    (path.parent / "plan-2.json").unlink()
    with pytest.raises(PlanError, match=r"plan-2\.json"):
        Ladder.load(tmp_path)


def test_an_interrupted_ladder_keeps_what_it_has(graph: OpGraph) -> None:
    at_best = ladder(graph, CLUSTER, (1, 2, 3), search=Searches({1: 4.0, 2: 3.0, 3: 2.0}, 2))
    assert [rung.step_s for rung in at_best.rungs] == [4.0, 3.0]
    assert "interrupted" in at_best.text()
    before = ladder(graph, CLUSTER, (1, 2, 3), search=Searches({1: 4.0, 2: None, 3: 2.0}, 2))
    assert [rung.devices for rung in before.rungs] == [1]
    with pytest.raises(KeyboardInterrupt):
        ladder(graph, CLUSTER, (1, 2), search=Searches({1: None, 2: 2.0}, 1))


def test_a_real_search_climbs(graph: OpGraph) -> None:
    made = ladder(graph, CLUSTER, (1, 2, 4), SearchConfig(planner="alpa"))
    steps = [rung.step_s for rung in made.rungs]
    assert steps == sorted(steps, reverse=True)
    assert all(step < math.inf for step in steps)


def test_a_shape_that_was_asked_for_is_told_with_its_time(graph: OpGraph) -> None:
    cluster = Cluster.local(2)
    fixed = SearchConfig(stages=1, replicas="auto", microbatches=1)
    found = ladder(graph, cluster, (1, 2), fixed)
    for rung in found.rungs:
        assert rung.plan is not None
        assert rung.plan.planner == "uniform"
        own = dataclasses.replace(rung.plan, predicted={})
        assert rung.step_s == simulate(graph, own, part_of(cluster, rung.devices)).step_s
    assert "inf" not in found.text()
    small = dataclasses.replace(device_kind("A100"), name="Small", memory=100)
    told = ladder(graph, Cluster((Node.of(small, 2),)), (1, 2), fixed)
    assert [rung.plan for rung in told.rungs] == [None, None]
    assert "does not fit: a rank needs" in told.rungs[0].reason
    assert "of 100 B, and what binds is stage 0" in told.rungs[0].reason
