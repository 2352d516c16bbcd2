"""Planners `uniform` and `manual`, and the registry."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

import raypar as rp
from raypar.errors import ConfigError, PlanError
from raypar.plan import Plan
from raypar.search.planners.base import (
    Planner,
    get_planner,
    planner_names,
    register_planner,
)
from raypar.testing import models


@cache
def _graph(name: str = "gpt", samples: int = 8):
    case = models.case(name)
    return rp.capture(case.model_fn, case.batch(0, samples), case.loss_fn, case.batch_dims)


def _plan(devices: int = 4, name: str = "gpt", samples: int = 8, **options) -> Plan:
    search = rp.SearchConfig(**{"planner": "uniform", **options})
    return rp.plan(_graph(name, samples), rp.Cluster.local(devices), search)


def _work(plan: Plan, graph) -> list[float]:
    ends = [graph.index[stage.last] + 1 for stage in plan.stages]
    work = [op.flops for op in graph.ops]
    return [sum(work[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class _Deep(torch.nn.Module):
    """Twelve equal blocks: can be balanced."""

    def __init__(self) -> None:
        super().__init__()
        linear = torch.nn.Linear
        blocks = (
            torch.nn.Sequential(linear(32, 64), torch.nn.GELU(), linear(64, 32)) for _ in range(12)
        )
        self.blocks = torch.nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).square().mean()


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_stages_of_equal_blocks_are_balanced(stages):
    graph = rp.capture(_Deep, torch.randn(64, 32))
    plan = rp.plan(graph, rp.Cluster.local(6), rp.SearchConfig(stages=stages, replicas=1))
    work = _work(plan, graph)
    assert len(work) == stages
    assert max(work) <= 1.1 * sum(work) / stages


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_of_a_gpt_are_balanced(stages):
    graph = _graph()
    work = _work(_plan(stages=stages), graph)
    heaviest_op = max(op.flops for op in graph.ops)
    assert max(work) <= max(1.3 * sum(work) / stages, sum(work) / stages + heaviest_op)


def test_the_cut_lies_between_blocks_not_inside_attention():
    plan = _plan(stages=2)
    graph = _graph()
    cut = graph.index[plan.stages[0].last] + 1
    sizes = {op.id: op.out_bytes for op in graph.ops}
    crossing = {
        i for op in graph.ops[cut:] for i in op.inputs
        if i in graph.index and graph.index[i] < cut and i not in graph.cloneable
    }  # fmt: skip
    hidden = min(sizes[i] for i in crossing)
    assert sum(sizes[i] for i in crossing) <= 2 * hidden


@pytest.mark.parametrize(
    ("devices", "options", "expected"),  # (stages, replicas, M)
    [
        (1, {}, (1, 1, 1)),
        (4, {}, (4, 1, 8)),
        (4, {"stages": 2}, (2, 2, 4)),
        (4, {"stages": 1}, (1, 4, 1)),
        (3, {"stages": 1}, (1, 2, 1)),  # 3 does not divide 8
        (4, {"replicas": 2}, (2, 2, 4)),
        (4, {"replicas": 4}, (1, 4, 1)),
        (4, {"stages": 3, "microbatches": 2}, (3, 1, 2)),
        (2, {"stages": 4, "chunks": 2}, (4, 1, 8)),
        (16, {}, (8, 2, 4)),
    ],
)
def test_what_auto_becomes(devices, options, expected):
    plan = _plan(devices, **options)
    assert (len(plan.stages), plan.replicas, plan.microbatches) == expected


def test_chunks_interleave():
    plan = _plan(2, stages=4, chunks=2)
    assert plan.schedule.name == "interleaved_1f1b"
    assert plan.schedule.placement == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert plan.stages[0].mesh == plan.stages[2].mesh != plan.stages[1].mesh


def test_where_samples_meet_only_the_user_raises_m():
    plan = _plan(4, "cnn", stages=2)
    assert (plan.replicas, plan.microbatches) == (1, 1)
    assert _plan(4, "cnn", stages=2, microbatches=4).microbatches == 4
    with pytest.raises(PlanError, match="samples meet at"):
        _plan(4, "cnn", replicas=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stages": 10_000}, r"has \d+ ops and \d+ places to cut: at most \d+ stages"),
        ({"stages": 0}, r"search\.stages is 0"),
        ({"stages": 3, "chunks": 2}, "multiple of 2"),
        ({"chunks": 0}, r"search\.chunks is 0"),
        ({"stages": 5}, r"need 5 devices, the cluster has 4; .*search\.chunks to 2"),
        ({"stages": 4, "replicas": 2}, "need 8 devices"),
        ({"replicas": 3}, "over 3 replicas|microbatches × 3 replicas|works"),
        ({"replicas": 5}, "need 5 devices"),
        ({"microbatches": 3}, "microbatches=2 works"),
        ({"microbatches": 0}, "at least 1"),
        ({"recompute": "ful"}, "Did you mean 'full'"),
        ({"schedule": "1f2b"}, "Did you mean '1f1b'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(options, text):
    with pytest.raises(PlanError, match=text):
        _plan(4, **options)


# -- manual -----------------------------------------------------------------------------------


def test_a_plan_file_is_taken_as_it_is(tmp_path):
    plan = dataclasses.replace(_plan(stages=2), planner="by hand")
    plan.save(tmp_path / "mine.json")
    assert _plan(planner="manual", manual=str(tmp_path / "mine.json")) == plan
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        _plan(planner="manual", manual=str(tmp_path / "nowhere.json"))
    with pytest.raises(PlanError, match="another graph"):
        _plan(planner="manual", manual=str(tmp_path / "mine.json"), samples=4)
    with pytest.raises(PlanError, match="cluster"):
        _plan(8, planner="manual", manual=str(tmp_path / "mine.json"))


def test_partial_overrides_keep_the_rest():
    base = _plan(stages=2)
    given = {
        "microbatches": 2,
        "stages": {"1": {"memory": {"recompute": "full"}}},
        "schedule": {"name": "gpipe"},
    }
    plan = _plan(stages=2, planner="manual", manual=given)
    assert plan.planner == "manual"
    assert {line.split(":")[0] for line in base.diff(plan)} == {
        "microbatches", "stages[1].memory.recompute", "schedule.name", "planner",
    }  # fmt: skip
    assert plan.stages[1].memory.recompute == "full"


def test_overrides_move_a_cut_and_devices():
    base, graph = _plan(stages=2), _graph()
    cut = next(c for c in graph.cuts if c > 3)
    given = {
        "stages": {
            0: {"last": graph.ops[cut - 1].id, "mesh": {"devices": [3, 1]}},
            1: {"first": graph.ops[cut].id},
        }
    }
    if base.replicas == 2:
        given["stages"][1]["mesh"] = {"devices": [0, 2]}
    plan = _plan(stages=2, planner="manual", manual=given)
    assert plan.stages[0].mesh.devices == (3, 1)
    assert plan.stages[0].last == graph.ops[cut - 1].id


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, r"search\.manual is not set"),
        ({"microbatch": 2}, "Did you mean 'microbatches'"),
        ({"stages": {"0": {"memory": {"recompue": "full"}}}}, "Did you mean 'recompute'"),
        ({"stages": {"7": {}}}, r"search\.manual\.stages: the plan has no '7'"),
        ({"stages": {"x": {}}}, "the plan has no 'x'"),
        ({"microbatches": "2"}, "expected int, found '2'"),
        ({"microbatches": 3}, "microbatches=2 works"),
        ({"schedule": {"name": "gpip"}}, "Did you mean 'gpipe'"),
        ({"schedule": "gpipe"}, r"schedule: expected an object"),
        ({"stages": []}, "no stages"),
        ({"stages": {"0": {"memory": {"recompute": "all"}}}}, "valid are none, selective, full"),
        ({"stages": {"0": {"last": "no/op"}}}, "the graph has no op 'no/op'"),
        ({"device": object()}, "JSON"),
        ({1: 2}, "the plan has no 1"),
        ({"stages": 3}, "expected a list"),
        ([1], "a path or"),
    ],
)
def test_wrong_overrides_are_refused(given, text):
    with pytest.raises(PlanError, match=text):
        _plan(stages=2, planner="manual", manual=given)


# -- registry ---------------------------------------------------------------------------------


def test_the_registry_lists_and_guesses():
    assert {"alpa", "exhaustive", "manual", "uniform"} <= set(planner_names())
    wanted = r"valid are alpa, .*manual, .*uniform\. Did you mean 'uniform'"
    with pytest.raises(ConfigError, match=wanted):
        get_planner("unifrom")
    with pytest.raises(ConfigError, match="Did you mean 'manual'"):
        _plan(planner="manul")


def test_a_name_is_registered_once_and_only_for_planners():
    with pytest.raises(TypeError, match="not a Planner"):
        register_planner(dict)

    class Mine(Planner):
        name = "uniform"

        def plan(self, graph, cluster, config):
            raise NotImplementedError

    with pytest.raises(ValueError, match="registered already"):
        register_planner(Mine)
    assert get_planner("uniform").__class__.__name__ == "UniformPlanner"


def test_more_replicas_than_samples_are_told() -> None:
    batch = (torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))
    loss = torch.nn.functional.cross_entropy
    one = rp.capture(lambda: torch.nn.Linear(4, 2), batch, loss)
    with pytest.raises(rp.PlanError, match=r"a global batch of 1 .* 2 replicas; replicas=1 works"):
        rp.plan(one, rp.Cluster.local(2), rp.SearchConfig(replicas=2))
