"""Values between nodes cross once and are shared inside the receiving mesh."""

from __future__ import annotations

import dataclasses
from functools import cache

import raypar as rp
from raypar.lowered import link_costs
from raypar.plan import MeshSlice, Plan
from raypar.stages.compile import compile_plan
from raypar.stages.transfers import edge_plan
from raypar.testing import models, random_plan
from raypar.testing.equivalence import default_optimizer


@cache
def _graph():
    case = models.case("gpt")
    return rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


def _plan(cluster: rp.Cluster) -> Plan:
    """One stage on device 0, the next one whole on devices 4 to 7."""
    plan = random_plan(_graph(), cluster, stages=2, replicas=1, microbatches=1, schedules=["gpipe"])
    meshes = (
        MeshSlice((0,), (1, 1), ("data", "x")),
        MeshSlice((4, 5, 6, 7), (1, 4), ("data", "x")),
    )
    stages = [dataclasses.replace(s, mesh=m) for s, m in zip(plan.stages, meshes, strict=True)]
    schedule = dataclasses.replace(plan.schedule, placement=((0, 0), (1, 0)))
    return dataclasses.replace(plan, stages=tuple(stages), schedule=schedule)


def test_across_nodes_a_value_crosses_once() -> None:
    plan = _plan(rp.Cluster.virtual(2, 4, "A100-40"))
    assert set(link_costs(plan)) == {(0, 1), (1, 0)}
    spec = compile_plan(_graph(), plan, optimizer=default_optimizer)[0]
    edge = spec.edges[0].name
    large = dataclasses.replace(spec, shapes={**spec.shapes, edge: ((4096, 1024), "float32")})
    moved = edge_plan(large, edge, 0, 1)
    assert moved.volume() == moved.lower_bound()


def test_on_one_node_links_are_alike() -> None:
    assert link_costs(_plan(rp.Cluster.virtual(1, 8, "A100-40"))) == {}
