"""What a simulated step pays for gradients under ZeRO, as `raypar.stages.gradients` moves them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import raypar as rp
from raypar.comm.scatter import ScatterBuckets
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import Link
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.simulate import simulate
from raypar.search.simulation import Simulation
from raypar.testing import models
from raypar.testing.equivalence import run_graph

PARTS = 4
SLOW = Link(1e6, 1e-6, "slow")


@cache
def graph() -> OpGraph:
    case = models.case("gpt")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


def planned(cluster: Cluster, zero: int, **options: object) -> Plan:
    config = SearchConfig(planner="uniform", replicas=2, microbatches=PARTS, zero=zero)
    return rp.plan(graph(), cluster, replace(config, **options))  # type: ignore[arg-type]


def played(zero: int, **options: object) -> Simulation:
    cluster = Cluster.virtual(1, 4, "H100", inside=SLOW)
    return simulate(graph(), planned(cluster, zero, **options), cluster)


def sent(found: Simulation) -> int:
    return sum(link.nbytes for link in found.links)


@pytest.mark.parametrize("options", [{}, {"stages": 2}])
def test_zero_2_sends_gradients_in_every_microbatch(options: dict[str, int]) -> None:
    once, often = played(1, **options), played(2, **options)
    costs = zip(once.setting.costs, often.setting.costs, strict=True)
    for one, many in costs:
        assert not one.rounds
        moved = sum(c.nbytes for c in many.rounds)
        assert moved == pytest.approx(
            sum(c.nbytes for c in one.sync if c.kind == "reduce_scatter"), rel=0.01
        )
    # A reduce-scatter of two ranks sends half of what it sums, from each of them.
    more = (PARTS - 1) * sum(c.nbytes for cost in often.setting.costs for c in cost.rounds)
    assert sent(often) - sent(once) == pytest.approx(more, rel=0.01)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
def test_gradients_of_a_microbatch_wait_for_those_of_the_one_before(schedule: str) -> None:
    often = played(2, stages=2, schedule=schedule)
    rounds = max(sum(c.seconds for c in cost.rounds) for cost in often.setting.costs)
    assert rounds > 0
    assert often.step_s > PARTS * rounds  # the network is what holds everybody up
    assert max(lane.communication for lane in often.lanes) > 0.5
    for lane in often.lanes:
        assert lane.compute + lane.communication + lane.idle == pytest.approx(1)
    assert often.path_shares()["sync"] > 0.3


def test_a_run_reduces_as_often_as_a_simulated_step(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    launch = ScatterBuckets._launch

    def count(self: ScatterBuckets, bucket: object) -> None:
        if self._group.rank == 0:
            launched.append(len(self._buckets))
        launch(self, bucket)  # type: ignore[arg-type]

    monkeypatch.setattr(ScatterBuckets, "_launch", count)
    case = models.case("gpt")
    seen = {}
    for zero in (1, 2):
        launched.clear()
        run_graph(graph(), case.batch(0, 8), planned(Cluster.local(2), zero))
        seen[zero] = len(launched) / launched[0]
    assert seen[2] == PARTS * seen[1] > 0
