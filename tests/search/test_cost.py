"""Machines, and the cost models over stages of real models."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.errors import ClusterError, ConfigError
from raypar.graph.costs import forward_flops
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration import (
    Calibration,
    DeviceRates,
    LinkRates,
    MatmulCurve,
    MemoryCurve,
    TierRates,
    table_calibration,
)
from raypar.mesh.cluster import Node
from raypar.mesh.devices import Link
from raypar.plan import MemoryPolicy, MeshSlice, Plan
from raypar.programs.products import Gradient, Product
from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import pack
from raypar.search.cost import params
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import StageCode, cost_model_names, get_cost_model, stage_code
from raypar.search.cost.exact import peak_bytes, stage_pieces
from raypar.search.cost.machine import MeshMachine, machine_of, p2p_s
from raypar.search.cost.params import accumulation_s, additions, bundle, moves, param_cost
from raypar.search.cost.profiled import ProfiledCost, profile, program_hash
from raypar.search.cost.quick import op_work, quick_costs, share_of
from raypar.search.cost.work import Work, node_work
from raypar.sharding.convert import COLLECTIVES
from raypar.sharding.layout import layout_of
from raypar.sharding.rules.base import Strategy
from raypar.sharding.spec import ShardingSpec
from raypar.testing import models

GB = 1e9


def _machine(
    cluster: Cluster, shape: tuple[int, ...] = (), axes: tuple[str, ...] = ("x",)
) -> MeshMachine:
    devices = tuple(range(cluster.n_devices))
    return machine_of(cluster, MeshSlice(devices, shape or (len(devices),), axes))


def _exact_links() -> Calibration:
    """Constants that leave the table's links and devices as they are."""
    rates = DeviceRates(
        {"float32": MatmulCurve(1.0, 0.0)}, {"plain": MemoryCurve(10e9, 10e9)}, 0.0,
        MemoryCurve(1e9, 1e9),
    )  # fmt: skip
    tier = TierRates(LinkRates(0.0, 1.0))
    return Calibration({"CPU": rates}, tier, tier)


def _nodes(*devices: int, inside: float = 10.0, across: float = 1.0) -> Cluster:
    return Cluster(
        tuple(
            Node.of(
                "CPU", n, name=f"n{i}", inside=Link(inside * GB, 0), across=Link(across * GB, 0)
            )
            for i, n in enumerate(devices)
        )
    )


# ---- machines -------------------------------------------------------------------------------


def test_an_op_takes_as_long_as_its_slower_side() -> None:
    machine = machine_of(Cluster.local(1), MeshSlice((0,), (1,)), _exact_links())
    assert machine.compute_s(80e9, 1) == pytest.approx(1.0)
    assert machine.compute_s(1, 20e9) == pytest.approx(2.0)
    assert machine.compute_s(1, 10e9, "int64", matmul=False) == pytest.approx(1.0)
    assert machine.compute_s(40e9, 1, "torch.float64") == pytest.approx(1.0)
    assert machine.optimizer_s(2e9) == pytest.approx(2.0)


def test_small_products_reach_less() -> None:
    curve = MatmulCurve(0.5, 1e6)
    assert curve.seconds(1e6, 1e9) == pytest.approx(4e-3)  # a quarter of the peak
    assert curve.seconds(1e12, 1e9) == pytest.approx(2000, rel=1e-3)


def test_the_slowest_device_counts() -> None:
    fast, slow = Node.of("H100", 1, name="a"), Node.of("V100", 1, name="b")
    cluster = Cluster((fast, slow))
    both = machine_of(cluster, MeshSlice((0, 1), (2,)))
    alone = machine_of(cluster, MeshSlice((1,), (1,)))
    assert both.compute_s(1e12, 1e9, "float16") == alone.compute_s(1e12, 1e9, "float16")
    assert both.memory_bytes == cluster.memory(1)
    assert machine_of(cluster, MeshSlice((0,), (1,))).memory_bytes == cluster.memory(0)


def test_collectives_move_what_the_best_algorithms_move() -> None:
    machine = machine_of(_nodes(4), MeshSlice((0, 1, 2, 3), (4,), ("x",)), _exact_links())
    assert machine.collective_s("x", "all_reduce", 10 * GB) == pytest.approx(1.5)
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert machine.collective_s("x", kind, 10 * GB) == pytest.approx(0.75)


def test_an_axis_inside_nodes_uses_the_inside_links() -> None:
    cluster = _nodes(2, 2)
    machine = machine_of(cluster, MeshSlice((0, 1, 2, 3), (2, 2), ("data", "x")), _exact_links())
    assert machine.collective_s("x", "all_gather", 10 * GB) == pytest.approx(0.5)
    assert machine.collective_s("data", "all_gather", 10 * GB) == pytest.approx(5.0)


def test_across_nodes_every_device_takes_its_part() -> None:
    cluster = _nodes(4, 4)
    machine = machine_of(cluster, MeshSlice(tuple(range(8)), (8,), ("x",)), _exact_links())
    # Inside: 3/4 of 10 GB at 10 GB/s; across: 1/2 of 2.5 GB at 1 GB/s.
    assert machine.collective_s("x", "all_gather", 10 * GB) == pytest.approx(0.75 + 1.25)
    assert machine.collective_s("x", "all_reduce", 10 * GB) == pytest.approx(1.5 + 2.5)
    # An all-to-all has no part in common: half of the 10 GB leaves through the own link.
    assert machine.collective_s("x", "all_to_all", 10 * GB) == pytest.approx(5.0)


def test_unequal_links_and_lines_take_the_slowest() -> None:
    slow = _nodes(2, 2)
    nodes = (slow.nodes[0], Node.of("CPU", 2, name="s", inside=Link(GB, 0), across=Link(GB, 0)))
    machine = machine_of(
        Cluster(nodes), MeshSlice((0, 1, 2, 3), (2, 2), ("data", "x")), _exact_links()
    )
    assert machine.collective_s("x", "all_gather", 10 * GB) == pytest.approx(5.0)


@given(st.integers(2, 8), st.integers(1, 4), st.sampled_from(COLLECTIVES))
def test_more_bytes_never_take_less(devices: int, nodes: int, kind: str) -> None:
    machine = _machine(_nodes(*[devices] * nodes))
    times = [machine.collective_s("x", kind, b) for b in (0, 1e3, 1e6, 1e9)]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_what_is_alone_exchanges_nothing() -> None:
    machine = _machine(_nodes(1))
    assert machine.collective_s("x", "all_reduce", 1e9) == 0
    with pytest.raises(ClusterError, match="no axis 'y'"):
        machine.collective_s("y", "all_reduce", 1)
    with pytest.raises(ClusterError, match="no collective"):
        machine.collective_s("x", "gossip", 1)


def test_messages_use_the_link_between_two_devices() -> None:
    cluster, calibration = _nodes(2, 2), _exact_links()
    assert p2p_s(cluster, 0, 0, 1e9, calibration) == 0
    assert p2p_s(cluster, 0, 1, 1e10, calibration) == pytest.approx(1.0)
    assert p2p_s(cluster, 0, 2, 1e10, calibration) == pytest.approx(10.0)
    assert table_calibration(cluster).note == "uncalibrated: device table"


# ---- parameters -----------------------------------------------------------------------------

AXES = (("data", 2), ("x", 4))


def test_replicas_reduce_and_zero_gathers() -> None:
    plain = layout_of((8, 6), ShardingSpec(("Rg", "R")), AXES, 0)
    back = moves(plain.stored, plain.held, plain.shape, 4, AXES, backward=True)
    assert back == [("data", "all_reduce", 192)]
    assert not moves(plain.stored, plain.held, plain.shape, 4, AXES)
    zero = layout_of((8, 6), ShardingSpec(("Rg", "R")), (("data", 2), *AXES[1:]), 2)
    there = moves(zero.stored, zero.held, zero.shape, 4, AXES)
    assert ("data", "all_gather") in [m[:2] for m in there]
    again = moves(zero.stored, zero.held, zero.shape, 4, AXES, backward=True)
    assert ("data", "reduce_scatter") in [m[:2] for m in again]
    assert max(m.nbytes for m in there) == 192


def test_gradients_travel_in_buckets() -> None:
    small = moves(ShardingSpec(("R",)), ShardingSpec(("Rg",)), (256,), 4, AXES[:1], backward=True)
    one = bundle(small * 100)
    assert one == (("data", "all_reduce", 102400),)
    many = bundle(small * 100_000)
    assert len(many) == round(102_400_000 / (4 << 20))
    assert sum(m.nbytes for m in many) == pytest.approx(102_400_000, rel=1e-4)


# ---- stages ---------------------------------------------------------------------------------


@lru_cache
def _captured(name: str) -> OpGraph:
    case = models.case(name)
    return capture(case.model_fn, case.batch(0, 4), case.loss_fn, case.batch_dims)


def _planned(name: str, stages: int = 2, **options: object) -> tuple[Plan, list[StageCode]]:
    graph = _captured(name)
    search = SearchConfig(
        planner="uniform", stages=stages, microbatches=2, schedule="1f1b",
        **{"replicas": 1, "recompute": "none", **options},  # type: ignore[arg-type]
    )  # fmt: skip
    width = int(str(options.get("replicas", 1)))
    plan = make_plan(graph, Cluster.local(stages * width), search)
    lowered = lower_plan(graph, plan)
    return plan, [stage_code(lowered, plan, i) for i in range(stages)]


def test_models_are_found_by_name() -> None:
    assert {"analytic", "profiled"} <= set(cost_model_names())
    assert isinstance(get_cost_model("analytic"), AnalyticCost)
    with pytest.raises(ConfigError, match="Did you mean 'analytic'"):
        get_cost_model("analytc")


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        "cnn",
        "mlp",
        pytest.param("lstm", marks=pytest.mark.thorough),
        pytest.param("t5", marks=pytest.mark.thorough),
        pytest.param("moe_sparse", marks=pytest.mark.thorough),
    ],
)
def test_every_model_has_a_cost(name: str) -> None:
    plan, stages = _planned(name)
    for stage, planned in zip(stages, plan.stages, strict=True):
        machine = machine_of(Cluster.local(2), planned.mesh)
        cost = AnalyticCost().stage_cost(stage, machine)
        assert cost.forward_s > 0
        assert cost.backward_s > 0
        assert cost.backward_input_s <= cost.backward_s * 1.0001
        # One op that makes both gradients (of a convolution) runs in both halves.
        halves = cost.backward_input_s + cost.backward_weight_s
        assert 0.999 * cost.backward_s <= halves <= 2 * cost.backward_s
        assert cost.optimizer_bytes == 2 * cost.gradient_bytes
        assert cost.forward_peak_bytes >= cost.saved_bytes - cost.half_bytes
        assert cost.peak_bytes(2) >= cost.resident_bytes + 2 * cost.saved_bytes
        assert not cost.forward_comm


def test_recomputing_saves_less_and_takes_longer() -> None:
    costs = {}
    for policy in ("none", "selective", "full"):
        plan, stages = _planned("gpt", recompute=policy)
        machine = machine_of(Cluster.local(2), plan.stages[0].mesh)
        costs[policy] = AnalyticCost().stage_cost(stages[0], machine)
    assert costs["full"].saved_bytes <= costs["selective"].saved_bytes < costs["none"].saved_bytes
    assert costs["full"].backward_s > costs["selective"].backward_s > costs["none"].backward_s
    assert costs["none"].forward_s == pytest.approx(costs["full"].forward_s, rel=0.01)


def test_replicas_pay_for_their_gradients() -> None:
    plan, stages = _planned("mlp", stages=1, replicas=2)
    machine = machine_of(Cluster.local(2), plan.stages[0].mesh)
    cost = AnalyticCost().stage_cost(stages[0], machine)
    assert {c[:2] for c in cost.sync} == {("data", "all_reduce")}
    assert sum(c.nbytes for c in cost.sync) == pytest.approx(cost.gradient_bytes, rel=0.01)
    assert all(c.seconds > 0 for c in cost.sync)
    assert not cost.gather


def test_more_states_take_more_memory() -> None:
    plan, stages = _planned("mlp", stages=1)
    machine = machine_of(Cluster.local(1), plan.stages[0].mesh)
    plain = AnalyticCost().stage_cost(stages[0], machine, optimizer_states=0)
    adam = AnalyticCost().stage_cost(stages[0], machine)
    assert plain.optimizer_bytes == 0
    assert adam.resident_bytes - plain.resident_bytes == 2 * adam.gradient_bytes
    assert pickle.loads(pickle.dumps(adam)) == adam


def test_the_walk_finds_the_most_that_is_held() -> None:
    """A chain of four values of one size holds two at a time; three where one is kept."""
    graph = fx.Graph()
    value = torch.empty(256)
    x = graph.placeholder("x")
    x.meta["val"] = value
    chain = [x]
    for _ in range(4):
        chain.append(graph.call_function(torch.ops.aten.relu.default, (chain[-1],)))
        chain[-1].meta["val"] = torch.empty(256)
    from raypar.programs.partition import Piece

    assert peak_bytes(Piece([x], chain[1:], [chain[-1]])) == 2 * 1024
    assert peak_bytes(Piece([x], chain[1:], [chain[-1], chain[1]])) == 3 * 1024
    assert peak_bytes(Piece([x], chain[1:], [chain[-1]]), freed=[x]) == 1024
    # What is taken away at once is not held while the rest is made.
    assert peak_bytes(Piece([x], chain[1:], [chain[-1], chain[1]]), sunk=[chain[1]]) == 2 * 1024


def test_saved_bytes_are_those_of_the_rank_that_runs_it() -> None:
    _, stages = _planned("gpt")
    for stage in stages:
        program = _program(stage)
        pieces = stage_pieces(stage)
        assert pieces.saved_bytes == program.saved_bytes
        assert pieces.half_bytes == program.half_bytes


# ---- ops ------------------------------------------------------------------------------------


def _program(stage: StageCode) -> StageProgram:
    return compile_stage(
        pack(stage.graph), name="x", device=torch.device("cpu"), recompute=stage.recompute,
        trainable=stage.trainable, differentiable=stage.differentiable,
        outputs_with_grad=stage.outputs_with_grad, changing=stage.changing,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["gpt", "cnn", pytest.param("moe_sparse", marks=pytest.mark.thorough)]
)
def test_additions_of_gradients_are_those_of_the_rank_that_runs_it(name: str) -> None:
    """Fused ones read the sum while they multiply; others read two and write one, in own calls."""
    _, stages = _planned(name, stages=1)
    program = _program(stages[0])
    given = [torch.zeros(v.shape, dtype=v.dtype) for v in _holders(stages[0])]
    kept = [given[i] for i in program.kept]
    fused: dict[str, int] = {}
    others: dict[str, int] = {}

    def sink(index: int, gradient: Gradient) -> None:
        own = fused if isinstance(gradient, Product) else others
        own[program.weight_gradients[index]] = math.prod(gradient.shape) * gradient.dtype.itemsize

    with torch.no_grad():
        results = program.forward(given)
        tangents = [torch.ones_like(results[i]) for i in program.tangent_outputs]
        program.backward([*kept, *results[program.n_outputs :], *tangents], sink)
    pieces, held = stage_pieces(stages[0]), param_cost(stages[0])
    assert pieces.products.keys() == fused.keys()
    assert dict(held.uncut) == fused | others
    found = additions(held, pieces.products)
    traffic = sum(work.nbytes * n for work, n in found.items())
    assert traffic == pytest.approx(sum(fused.values()) + 3 * sum(others.values()))
    assert sum(work.calls * n for work, n in found.items()) == len(others)
    assert {work for work, n in found.items() if n < 0} <= set(pieces.products.values())
    assert fused
    assert others
    # Where every rank keeps a part of the sum, a product is made first, and cut.
    cut = additions(held._replace(uncut=()), pieces.products)
    assert sum(w.nbytes * n for w, n in cut.items()) == pytest.approx(3 * held.gradient_bytes)


def test_a_sum_is_read_while_a_product_is_made() -> None:
    """What waits for its work hides the reading; what waits for memory does not."""
    machine = _machine(Cluster.virtual(1, 1, "H100"))
    _, stages = _planned("mlp", stages=1)
    n = 4096
    own = 4 * n * n
    held = param_cost(stages[0])._replace(uncut=(("w", own),), gradient_bytes=own, optimized=1)

    def seconds(inner: int) -> float:
        product = Work(2.0 * n * inner * n, 4.0 * (2 * n * inner + n * n), matmul=True, kind="")
        return accumulation_s(held, machine, {"w": product})

    assert seconds(n) == 0.0
    read = Work(0.0, own).seconds(machine) - Work(0.0, 0.0).seconds(machine)
    assert seconds(1) == pytest.approx(read, rel=0.01)


def _holders(stage: StageCode) -> list[torch.Tensor]:
    return [n.meta["val"] for n in stage.graph.find_nodes(op="placeholder")]


def test_a_product_that_is_added_to_its_sum_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh())

    graph = capture(wide, (torch.randn(4, 256),), lambda made: made.square().mean())
    plan = make_plan(graph, Cluster.local(2), SearchConfig(stages=1, replicas=2, microbatches=2))
    weight = 256 * 256 * 4
    for zero, bucket, least in (
        (0, 4 << 20, 0), (1, 4 << 20, weight), (1, weight, 0), (2, weight, weight)
    ):  # fmt: skip
        monkeypatch.setattr(params, "BUCKET_BYTES", bucket)
        stage = replace(plan.stages[0], memory=MemoryPolicy("none", zero))
        changed = replace(plan, stages=(stage,))
        code = stage_code(lower_plan(graph, changed), changed, 0)
        machine = machine_of(Cluster.local(2), stage.mesh)
        peak = AnalyticCost().stage_cost(code, machine).backward_peak_bytes
        assert abs(peak - least) < weight / 8


def _calls(stage: StageCode) -> list[fx.Node]:
    return [n for n in stage.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    "name", ["gpt", "cnn", "mlp", pytest.param("t5", marks=pytest.mark.thorough)]
)
def test_quick_costs_agree_with_the_programs(name: str) -> None:
    plan, stages = _planned(name, stages=1)
    # On a device without overheads: what counts is the work.
    machine = machine_of(Cluster.local(1), plan.stages[0].mesh, _exact_links())
    cost = AnalyticCost().stage_cost(stages[0], machine)
    forward, first, second = quick_costs(_calls(stages[0]), machine).seconds.sum(axis=0)
    assert forward == pytest.approx(cost.forward_s, rel=0.25)
    adding = accumulation_s(param_cost(stages[0]), machine, stage_pieces(stages[0]).products)
    assert first + second + adding == pytest.approx(cost.backward_s, rel=0.35)


def test_equal_ops_are_looked_at_once_and_cost_the_same() -> None:
    _, stages = _planned("gpt", stages=1)
    machine = _machine(Cluster.virtual(1, 1, "H100"))
    nodes = _calls(stages[0])
    found = quick_costs(nodes * 3, machine)
    alone = [quick_costs([n], machine).seconds[0].tolist() for n in nodes]
    assert found.seconds.tolist() == alone * 3
    assert found.flops.sum() == pytest.approx(
        3 * sum(node_work(n).flops for n in nodes if node_work(n).matmul)
        + 3 * sum(node_work(n).flops for n in nodes if not node_work(n).matmul)
    )


def test_a_product_has_one_product_more_for_each_operand() -> None:
    _, stages = _planned("mlp", stages=1)
    linear = [n for n in _calls(stages[0]) if node_work(n).matmul]
    first, second = op_work(linear[0]), op_work(linear[-1])
    assert not first.backward_input  # the batch wants no gradient
    assert second.backward_input[0].flops == forward_flops(linear[-1])
    assert second.backward_weight[0].flops == forward_flops(linear[-1])


def test_a_strategy_divides_the_work_by_the_axes_it_cuts() -> None:
    def strategy(*states: str) -> Strategy:
        specs = [ShardingSpec(s.split(",")) for s in states]
        return Strategy(tuple(specs[:-1]), (specs[-1],), ("", ""))

    assert share_of(strategy("S0,R", "Rg,S1", "S0,S1"), (2, 4)) == 1 / 8
    assert share_of(strategy("R,S1", "R,S0", "R,P"), (2, 4)) == 1 / 4
    assert share_of(strategy("R,R", "R,R", "R,R"), (2, 4)) == 1


def test_what_goes_step_by_step_pays_for_every_step() -> None:
    plan, stages = _planned("gru", stages=1)
    machine = machine_of(Cluster.local(1), plan.stages[0].mesh)
    works = [node_work(n) for n in stage_pieces(stages[0]).forward.nodes]
    (layer,) = [w for w in works if w.kind == "recurrent"]
    assert layer.calls > 10
    assert layer.seconds(machine) >= (layer.calls - 1) * machine.overhead_s
    (noise, *_) = [
        node_work(n)
        for n in _calls(_planned("gpt_dropout", stages=1)[1][0])
        if node_work(n).kind == "random"
    ]
    assert noise.calls > 1


# ---- profiled -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "cnn", "t5"])
def test_stages_are_really_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypar.search.cost.profiled._BUDGET_S", 0.0)
    plan, stages = _planned(name)
    machine = machine_of(Cluster.local(2), plan.stages[0].mesh)
    cost = ProfiledCost().stage_cost(stages[1], machine)
    assert min(cost.forward_s, cost.backward_s, cost.backward_input_s, cost.backward_weight_s) > 0
    analytic = AnalyticCost().stage_cost(stages[1], machine)
    assert cost.saved_bytes == analytic.saved_bytes
    assert cost.forward_s != analytic.forward_s


def test_equal_programs_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from raypar.programs.wire import pack

    _, stages = _planned("gpt")
    _, again = _planned("gpt")
    _, other = _planned("gpt", recompute="full")
    hashes = [program_hash(s[0], pack(s[0].graph)) for s in (stages, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    calls = []
    known = profile

    def counted(stage: StageCode, wire: object = None) -> object:
        calls.append(stage)
        return known(stage)

    monkeypatch.setattr("raypar.search.cost.profiled._BUDGET_S", 0.0)
    monkeypatch.setattr("raypar.search.cost.profiled.profile", counted)
    monkeypatch.setattr(ProfiledCost, "_known", {})
    machine = _machine(Cluster.local(1))
    costs = [ProfiledCost().stage_cost(s[0], machine) for s in (stages, again)]
    assert len(calls) == 1
    assert costs[0].forward_s == costs[1].forward_s


def test_a_calibration_is_plain_json() -> None:
    text = table_calibration(Cluster.local(2)).to_json()
    assert "Infinity" not in text
    assert json.loads(text)["measured"] is False
