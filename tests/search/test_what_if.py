from dataclasses import replace

import pytest
import torch
from torch import nn

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import gpt
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import MemoryPolicy
from raypar.search.simulate import simulate
from raypar.search.what_if import AS_IT_IS, WhatIf, what_if


@pytest.fixture(scope="module")
def graph() -> rp.OpGraph:
    return rp.capture(
        lambda: gpt(layers=2, width=32, heads=2, seq_len=16), next(stdlib_bytes(16, 16))
    )


def by_name(rows: tuple[WhatIf, ...]) -> dict[str, WhatIf]:
    return {row.change: row for row in rows}


def test_links_and_devices_change_a_step_the_right_way(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.virtual(2, 1, "A100")
    calibration = table_calibration(cluster)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=4))
    found = by_name(what_if(graph, plan, cluster, calibration=calibration))
    assert list(found) == [
        "2 × devices", "½ × bandwidth", "2 × bandwidth", "½ × memory", "2 × memory",
    ]  # fmt: skip
    now = simulate(graph, plan, cluster, calibration=calibration).step_s
    assert {row.before_s for row in found.values()} == {now}
    slow, fast = found["½ × bandwidth"], found["2 × bandwidth"]
    assert slow.kept_s is not None
    assert fast.kept_s is not None
    assert slow.kept_s > now > fast.kept_s
    # There is memory enough: more or less of it changes nothing.
    assert found["½ × memory"].kept_s == found["2 × memory"].kept_s == now
    assert found["½ × memory"].kept == AS_IT_IS
    more = found["2 × devices"]
    assert more.kept_s is not None
    assert more.kept_s < now
    assert more.kept.startswith("2 replicas")
    assert more.detail == "2 nodes more of the same: 4 devices"
    assert {row.planner for row in found.values()} == {""}


def test_a_model_of_one_replica_leaves_new_devices_idle() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    graph = rp.capture(model, torch.randn(8, 4), lambda out: out.square().mean())
    cluster = rp.Cluster.local(2)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2))
    found = by_name(what_if(graph, plan, cluster))["2 × devices"]
    assert found.kept == "as it is, on half of the devices"
    assert found.kept_s == pytest.approx(found.before_s)


def test_less_memory_is_met_by_recomputation_or_told() -> None:
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.GELU())]
    graph = rp.capture(
        lambda: nn.Sequential(*layers), torch.randn(512, 16), lambda out: out.square().mean()
    )
    config = rp.SearchConfig(stages=2, microbatches=8, schedule="gpipe")
    plan = rp.plan(graph, rp.Cluster.local(2), config)
    lean = replace(plan, stages=tuple(replace(s, memory=MemoryPolicy("full")) for s in plan.stages))

    def filled(by: rp.Plan, share: float) -> Cluster:
        """A cluster of which the plan fills so much of what it may fill."""
        roomy = rp.Cluster.local(2)
        peak = max(simulate(graph, by, roomy, calibration=table_calibration(roomy)).peak_bytes)
        return Cluster((Node.of("CPU", 2, host_memory=int(2 * peak / share / 0.9)),))

    def memory(of: rp.Plan, cluster: Cluster, change: str) -> WhatIf:
        return by_name(what_if(graph, of, cluster, calibration=table_calibration(cluster)))[change]

    half = memory(plan, filled(plan, 0.95), "½ × memory")
    assert half.kept == "recompute full on every stage"
    assert half.kept_s is not None
    assert half.kept_s > half.before_s
    none = memory(lean, filled(lean, 0.95), "½ × memory")
    assert none.kept_s is None
    assert "that it may fill" in none.kept
    # A plan that recomputes is faster without, where there is room to save.
    twice = memory(lean, filled(plan, 1.5), "2 × memory")
    assert twice.kept == "recompute none on every stage"
    assert twice.kept_s is not None
    assert twice.kept_s < twice.before_s


def test_plans_are_made_anew_while_there_is_time(graph: rp.OpGraph) -> None:
    cluster = rp.Cluster.virtual(1, 2, "A100")
    config = rp.SearchConfig(planner="uniform", stages=2, microbatches=4)
    plan = rp.plan(graph, cluster, config)
    found = by_name(what_if(graph, plan, cluster, config=config))
    assert {row.planner for row in found.values()} == {"uniform"}
    same = found["½ × bandwidth"]
    assert same.replanned_s == pytest.approx(same.kept_s)
    assert "2 stages" in same.replanned
    assert same.best_s == min(same.kept_s or 0, same.replanned_s or 0)
    late = what_if(graph, plan, cluster, config=config, limit_s=0.0)
    assert {row.replanned_s for row in late} == {None}
    assert "used up" in late[0].replanned
    # What a planner cannot do is told, and the rest goes on.
    wrong = replace(config, replicas=8)
    told = what_if(graph, plan, cluster, config=wrong)
    assert all(row.replanned_s is None and "search.stages" in row.replanned for row in told)
    assert all(row.kept_s for row in told)
