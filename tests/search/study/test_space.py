"""Every proposal can be carried out, and every plan of one trains exactly like the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import raypar as rp
from raypar.fit import check_plan
from raypar.mesh.cluster import Cluster, Node
from raypar.search.config import SearchConfig
from raypar.search.interop.ways import WayKey, op_sharding
from raypar.search.interop.workbench import Workbench
from raypar.search.intra.forms import form_pattern
from raypar.search.study.draft import InfeasibleError
from raypar.search.study.judge import Judge
from raypar.search.study.space import Decisions
from raypar.testing import models
from raypar.testing.equivalence import assert_plan_equivalent
from tests._tiers import examples


class Dice:
    """Proposes at random and remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.params[name] = self.rng.choice(list(choices))
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.params[name] = self.rng.randint(low, high)
        return int(self.params[name])


@cache
def judge(name: str, devices: int = 4, **options: Any) -> Judge:
    case = models.case(name)
    graph = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    cluster = rp.Cluster.local(devices)
    return Judge(Workbench(graph, cluster, SearchConfig(planner="optuna", **options)))


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@settings(max_examples=examples(10, 30), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_a_proposal_is_a_plan_or_says_why_not(name: str, seed: int) -> None:
    own = judge(name)
    decisions = own.space.suggest(Dice(seed))
    try:
        plan = own.drafter.draft(decisions).plan(own.bench)
    except InfeasibleError as error:
        event(str(error)[:40])
        return
    check_plan(plan, own.bench.graph, own.bench.cluster)
    assert plan.replicas == decisions.replicas
    assert plan.local_batch == decisions.local_batch
    if decisions.groups:
        assert len({group for group, _ in plan.schedule.placement}) <= decisions.groups
    if decisions.recompute != "solver" and not decisions.policies:
        assert {s.memory.recompute for s in plan.stages} == {decisions.recompute}
    if decisions.zero != "solver" and not decisions.policies:
        for stage in plan.stages:
            assert stage.memory.zero == (decisions.zero if len(stage.mesh.devices) > 1 else 0)


@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.thorough)])
def test_plans_of_proposals_train_like_the_model(name: str) -> None:
    own, case = judge(name), models.case(name)
    checked = 0
    for seed in range(60):
        try:
            draft = own.drafter.draft(own.space.suggest(Dice(seed)))
        except InfeasibleError:
            continue
        plan = draft.plan(own.bench)
        if len(plan.devices) < 2 or (checked % 2 and len(plan.stages) < 3):
            continue
        assert_plan_equivalent(case.model_fn, case.batch(0, 8), plan, loss_fn=case.loss_fn, steps=1)
        checked += 1
        if checked == 4:
            return
    raise AssertionError(f"only {checked} proposals gave plans on several devices")


def test_fixed_options_hold_in_every_proposal() -> None:
    own = judge("mlp", stages=2, replicas=2, microbatches=2, recompute="full", zero=1, tensor=1)
    for seed in range(10):
        decisions = own.space.suggest(Dice(seed))
        try:
            plan = own.drafter.draft(decisions).plan(own.bench)
        except InfeasibleError:
            continue
        assert (len(plan.stages), plan.replicas, plan.microbatches) == (2, 2, 2)
        assert {s.memory.recompute for s in plan.stages} == {"full"}
        assert {s.memory.zero for s in plan.stages} == {1}


def test_what_is_proposed_near_a_plan_is_like_it() -> None:
    own = judge("gpt")
    plan = rp.plan(own.bench.graph, own.bench.cluster, SearchConfig(planner="uniform", stages=2))
    params = own.space.parameters_of(plan)
    trial = optuna.trial.FixedTrial(params)
    near = own.space.suggest(trial)
    assert near.groups == 2
    assert near.replicas == plan.replicas
    assert near.local_batch == plan.local_batch


def test_neighbours_begin_with_schedules_and_trades_that_keep_all_devices_busy() -> None:
    dice, own = Dice(0), judge("gpt")
    own.space.suggest(dice)
    told = Decisions(replicas=2, local_batch=1, devices=2, groups=1)
    plan = own.drafter.draft(told).plan(own.bench)
    # Four devices a stage were asked for, and there is room for two.
    base = dice.params | {"replicas": 2, "devices": 4, "groups": 1, "chunks": 1}
    near = list(own.space.neighbours(base, plan))
    others = len(own.space.schedules) - 1
    assert len({p["schedule"] for p in near[:others]} | {base["schedule"]}) == others + 1
    found = near[others:]
    trades = [(p["replicas"], p["devices"], p["groups"]) for p in found[:4]]
    assert set(trades) == {(1, 4, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)}
    assert all({**base, **p}["local_batch"] == base["local_batch"] for p in found[:4])
    assert {p["devices"] for p in found[4:]} > {4}  # other decisions change that one alone


def test_a_forced_form_is_honoured() -> None:
    own = judge("gpt")
    pattern = next(p for p in own.space.patterns if "feed_forward" in p)
    base: dict[str, Any] = {
        "replicas": 1, "local_batch": 8, "devices": 4, "groups": 1, "used": 4, "modes": "solver",
    }  # fmt: skip
    for form, state in (("column", "S0"), ("row", "S1"), ("batch", "R")):
        draft = own.drafter.draft(Decisions(forms=((pattern, form),), **base))
        key = draft.stages[0].way.key
        assert isinstance(key, WayKey)
        texts = op_sharding(key.sharding, own.bench.units, own.bench.graph)
        ops = [op for op in own.bench.graph.ops if any(_reads(k, pattern) for k in op.inputs)]
        assert ops
        for op in ops:
            weight = next(i for i, k in enumerate(op.inputs) if _reads(k, pattern))
            states = texts[op.id].split(" > ")[0].split(" ")[weight].split(",")
            if form == "batch":
                assert all(not s.startswith("S") for s in states)
            else:
                assert any(s.startswith(state) for s in states), (op.id, texts[op.id])


def _reads(key: str, pattern: str) -> bool:
    return key.startswith("param:") and form_pattern(key[6:]) == pattern


def test_unequal_nodes_may_be_left_out_or_taken_from_the_end() -> None:
    nodes = (Node.of("A100", 2), Node.of("L4", 2, name="node1"))
    case = models.case("mlp")
    graph = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    own = Judge(Workbench(graph, Cluster(nodes, "mixed"), SearchConfig(planner="optuna")))
    assert own.space.used == [4, 2]
    plain = own.drafter.draft(Decisions(1, 8, devices=1, groups=4, used=4)).plan(own.bench)
    turned = own.drafter.draft(Decisions(1, 8, devices=1, groups=4, used=4, turned=True))
    fewer = own.drafter.draft(Decisions(1, 8, devices=1, groups=2, used=2)).plan(own.bench)
    assert max(fewer.devices) < 2
    assert plain.stages[0].mesh.devices == (0,)
    assert turned.plan(own.bench).stages[0].mesh.devices == (3,)
