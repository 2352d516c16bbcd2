"""Every way in which a plan may not fit has a message of its own; plans move to other captures."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

import raypar as rp
from raypar._plan_text import span
from raypar.errors import PlanError
from raypar.fit import check_plan, stage_ranges
from raypar.plan import MemoryPolicy, MeshSlice, Plan, ScheduleSpec
from raypar.testing import assert_plan_equivalent, models, random_plan

CLUSTER = rp.Cluster.local(4)


class Net(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("a", "b", "c", "d"), width: int = 8) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(getattr(self, name)(x))
        return x.square().mean()


def net() -> nn.Module:
    return Net().double()


def _batch(samples: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(1)).double()


@cache
def _graph(samples: int = 8):
    return rp.capture(net, _batch(samples))


def _plan(**options) -> Plan:
    options = {"stages": 2, "replicas": 2, "microbatches": 2} | options
    return rp.plan(_graph(), CLUSTER, rp.SearchConfig(**options))


def _stage(number: int, **changes):
    def change(plan: Plan) -> Plan:
        stages = list(plan.stages)
        stages[number] = dataclasses.replace(stages[number], **changes)
        return dataclasses.replace(plan, stages=tuple(stages))

    return change


def _with(**changes):
    return lambda plan: dataclasses.replace(plan, **changes)


def _placed(*placement, name="1f1b"):
    return _with(schedule=ScheduleSpec(name, placement))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_with(stages=()), "no stages"),
        (_with(microbatches=0), "at least 1"),
        (_with(microbatches=-2), "at least 1"),
        (_with(global_batch=0), "at least 1"),
        (
            _with(microbatches=3),
            r"8 does not divide into 6 .* 3 microbatches × 2 .* microbatches=2 .* batch of 6",
        ),
        (_with(microbatches=16), "microbatches=4 works"),
        (_with(global_batch=7), r"replicas=1 works .*, or a global batch of \d+ "),
        (_with(global_batch=10**15), "at most 2147483648"),
        (_with(global_batch=2**31 - 2, microbatches=7**9), "microbatches=.* works"),
        (_with(global_batch=16), "the example batch has 8"),
        (_with(graph_hash="0" * 32), "another graph .* the same parameters"),
        (_with(graph_hash="0" * 32, params_hash="1"), "another graph .* other parameters"),
        (_with(batch_dims=(1,)), "batch_dims"),
        (_with(cluster=(2, 2)), r"devices per node \(2, 2\), this one has \(4,\)"),
        (_stage(0, memory=MemoryPolicy("ful")), "Did you mean 'full'"),
        (_stage(1, sharding={"x": "S(0)"}), "sharding"),
        (_stage(1, mesh=MeshSlice((1, 2), (2,))), "overlap"),
        (_stage(1, mesh=MeshSlice((2,), (1,))), "equally many"),
        (_stage(1, mesh=MeshSlice((2, 2), (2,))), "each device once"),
        (_stage(1, mesh=MeshSlice((), (0,))), "each device once"),
        (_stage(1, mesh=MeshSlice((2, -3), (2,))), "start at 0"),
        (_stage(1, mesh=MeshSlice((2, 3), (1, 2), ("data", "x"))), "equally many"),
        (_stage(1, mesh=MeshSlice((2, 3), (3, 2), ("data", "x"))), "product must be"),
        (_stage(1, mesh=MeshSlice((2, 3), (2, 1), ("data", "data"))), "names are different"),
        (_stage(1, mesh=MeshSlice((2, 3), (1, 2), ("x", "data"))), "comes first"),
        (_stage(1, memory=MemoryPolicy("none", 4)), "zero is 4; valid are 0"),
        (
            _stage(1, mesh=MeshSlice((2, 3), (2, 1), ("data", "x")), sharding={"b/liner": "R > R"}),
            "no op of the stage",
        ),
        (_stage(1, mesh=MeshSlice((2, 7), (2,))), "device 7, the cluster has 4"),
        (_stage(0, last="c/liner"), "no op 'c/liner'. Did you mean"),
        (_stage(0, first="nowhere"), "the graph has no op 'nowhere'"),
        (lambda p: _stage(1, last=_graph().ops[-2].id)(p), "set its 'last' to"),
        (lambda p: _stage(1, first=_graph().ops[-1].id)(p), "cover all"),
        (lambda p: _stage(0, last=_graph().ops[-1].id)(p), "cover all"),
        (lambda p: dataclasses.replace(p, stages=p.stages[::-1]), "cover all"),
        (_placed((0, 0)), "names 1 stages, the plan has 2"),
        (_placed((0, 0), (0, 1)), "one mesh slice|one rank group"),
        (_placed((0, 0), (2, 0)), "number them 0 to 1"),
        (_placed((0, 0), (1, 1)), "chunks count up"),
        (_placed((0, 0), (1, 0), name="1f1"), "Did you mean '1f1b'"),
        (
            lambda p: _stage(1, mesh=p.stages[0].mesh)(p),
            "share a mesh slice",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_why(change, text):
    plan = _plan()
    check_plan(plan, _graph(), CLUSTER)
    with pytest.raises(PlanError, match=text):
        check_plan(change(plan), _graph(), CLUSTER)


def test_a_cut_where_the_graph_cannot_be_cut_names_the_nearest():
    case = models.case("cnn")
    graph = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    place = next(k for k in range(2, len(graph.ops)) if k not in graph.cuts)
    plan = rp.plan(graph, CLUSTER, rp.SearchConfig(stages=2))
    stages = (
        dataclasses.replace(plan.stages[0], last=graph.ops[place - 1].id),
        dataclasses.replace(plan.stages[1], first=graph.ops[place].id),
    )
    with pytest.raises(PlanError, match=r"cannot be cut .* the nearest cut is behind"):
        check_plan(dataclasses.replace(plan, stages=stages), graph, CLUSTER)


def test_stages_cover_every_op_once():
    for seed in range(20):
        plan = random_plan(_graph(), CLUSTER, seed=seed)
        ranges = stage_ranges(plan, _graph())
        places = [i for first, end in ranges for i in range(first, end)]
        assert places == list(range(len(_graph().ops)))


def test_more_stages_than_ops():
    count = len(_graph().ops) + 1
    for make in (
        lambda: rp.plan(_graph(), CLUSTER, rp.SearchConfig(stages=count)),
        lambda: random_plan(_graph(), CLUSTER, stages=count),
    ):
        with pytest.raises(PlanError, match=f"{count}.*{len(_graph().cuts) + 1} stages"):
            make()


# -- rebind -----------------------------------------------------------------------------------


def test_a_plan_moves_to_another_batch_size_and_trains_there():
    plan, graph = _plan(recompute="selective"), _graph(16)
    moved = plan.rebind(graph)
    check_plan(moved, graph, CLUSTER)
    assert (moved.global_batch, moved.graph_hash) == (16, graph.hash)
    assert [s.last for s in moved.stages] == [s.last for s in plan.stages]
    assert moved.schedule == plan.schedule
    assert [s.memory for s in moved.stages] == [s.memory for s in plan.stages]
    assert_plan_equivalent(net, _batch(16), moved, steps=1)
    assert moved.rebind(_graph()) == plan


def test_where_an_op_is_gone_the_cuts_are_balanced_again():
    plan = _plan(stages=4, replicas=1)
    graph = rp.capture(lambda: Net(("a", "x", "y", "d")).double(), _batch())
    with pytest.raises(PlanError, match="another graph"):
        check_plan(plan, graph, CLUSTER)
    moved = plan.rebind(graph)
    check_plan(moved, graph, CLUSTER)
    assert len(moved.stages) == 4
    assert [s.mesh for s in moved.stages] == [s.mesh for s in plan.stages]
    uniform = rp.plan(graph, CLUSTER, rp.SearchConfig(stages=4, replicas=1, microbatches=2))
    assert [s.last for s in moved.stages] == [s.last for s in uniform.stages]


def _sharded(samples: int = 8) -> Plan:
    """Two stages on meshes of two; the batch is cut in both."""
    graph = _graph(samples)
    plan = rp.plan(graph, CLUSTER, rp.SearchConfig(stages=2, replicas=1, microbatches=2))
    stages = []
    for s, stage in enumerate(plan.stages):
        first, last = graph.index[stage.first], graph.index[stage.last]
        ops = [op.id for op in graph.ops[first : last + 1]]
        sharding = {key: "S0 > S0" for key in ops if "tanh" in key}
        sharding |= {key: "S0 Rg Rg > S0" for key in ops if "linear" in key}
        mesh = MeshSlice((2 * s, 2 * s + 1), (1, 2), ("data", "x"))
        stages.append(dataclasses.replace(stage, mesh=mesh, sharding=sharding))
    plan = dataclasses.replace(plan, stages=tuple(stages))
    assert all(s.sharding for s in plan.stages)
    return plan


def test_shardings_move_with_their_ops():
    plan, graph = _sharded(), _graph(16)
    moved = plan.rebind(graph)
    assert [s.sharding for s in moved.stages] == [s.sharding for s in plan.stages]
    assert_plan_equivalent(net, _batch(16), moved, steps=1)
    # Where the stages are cut anew, ops take their strategies along, and gone ones leave none.
    renamed = rp.capture(lambda: Net(("a", "x", "y", "d")).double(), _batch())
    anew = plan.rebind(renamed)
    check_plan(anew, renamed, CLUSTER)
    assert {k for s in anew.stages for k in s.sharding} == {
        k for s in plan.stages for k in s.sharding if k in renamed.index
    }


def test_strategies_that_no_longer_divide_are_left_out():
    graph = _graph(2)  # one sample a microbatch: no batch to cut
    moved = _sharded().rebind(graph)
    assert not any(s.sharding for s in moved.stages)
    assert_plan_equivalent(net, _batch(2), moved, steps=1)


def test_predictions_do_not_move():
    plan = dataclasses.replace(_stage(0, predicted={"forward_s": 1.0})(_plan()), predicted={"x": 1})
    moved = plan.rebind(_graph(16))
    assert not moved.predicted
    assert not moved.stages[0].predicted


@pytest.mark.parametrize(
    ("samples", "options", "text"),
    [
        (6, {}, r"2 microbatches × 2 replicas.* batch of 6"),
        (1, {}, "batch of 1"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(samples, options, text):
    with pytest.raises(PlanError, match=text):
        _plan(**options).rebind(_graph(samples))


def test_other_models_are_refused():
    case = models.case("cnn")
    cnn = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    with pytest.raises(PlanError, match="samples meet at"):
        _plan().rebind(cnn)
    short = rp.capture(lambda: nn.Linear(8, 1).double(), _batch(), lambda out, _: out.mean())
    with pytest.raises(PlanError, match="stages need"):
        _plan(stages=4, replicas=1).rebind(short)


# -- what a person reads ----------------------------------------------------------------------


def test_diff_names_every_field_and_no_other():
    plan = _plan()
    other = dataclasses.replace(
        _stage(1, memory=MemoryPolicy("full"))(plan), microbatches=4, predicted={"step_s": 1.5}
    )
    assert plan.diff(other) == [
        "microbatches: 2 → 4",
        "stages[1].memory.recompute: none → full",
        "predicted.step_s: None → 1.5",
    ]
    assert plan.diff(plan) == []
    assert any(line.startswith("stages[1]") for line in plan.diff(_plan(stages=1)))


@pytest.mark.parametrize("seed", range(8))
def test_the_table_shows_every_stage(seed):
    plan = random_plan(_graph(), CLUSTER, seed=seed)
    text = plan.explain(_graph())
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["stage"])
    rows = lines[start + 1 : start + 1 + len(plan.stages)]
    for number, (row, stage) in enumerate(zip(rows, plan.stages, strict=True)):
        cells = row.split()
        assert cells[0] == str(number)
        assert {stage.first, stage.last, stage.memory.recompute} <= set(cells)
        assert span(stage.mesh.devices) in cells
    assert plan.schedule.name in text
    assert f"batch 8 = {plan.microbatches} microbatch" in text
    assert max(map(len, lines)) < 200
