"""The law on meshes: any strategy of any op, any ZeRO level, trains like the unsplit model.

`release/equivalence.py --meshes ...` runs it on every model of the zoo with many more plans.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

import raypar as rp
from raypar.errors import PlanError
from raypar.plan import MemoryPolicy, Plan
from raypar.stages.recipe import Recipe
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.equivalence import gaps, reference_run, run_graph
from raypar.testing.sharding import MESHES

FEW, MANY = rp.Cluster.local(2), rp.Cluster.local(16)
EXACT = 1e-9


@cache
def _captured(name: str, samples: int = 8):
    case = models.case(name)
    batch = case.batch(0, samples)
    return batch, rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)


def _worst(name: str, plan: Plan) -> float:
    batch, graph = _captured(name)
    wanted = reference_run(graph, batch, plan, steps=2)
    found = run_graph(graph, batch, plan, steps=2)
    gap = max(gaps(found, wanted), key=lambda g: g.ratio)
    print(f"worst: {gap.what} {gap.text}")
    return gap.ratio


MODELS = (
    "mlp", "gpt", "gpt_dropout", "t5", "cnn", "unet", "moe_dense", "masked_mean", "dlrm", "lstm",
)  # fmt: skip


SLOW = {("gpt_dropout", 3): 8, ("cnn", 5): 14, ("moe_dense", 7): 8, ("lstm", 10): 14}
"""Plans that take long, and the seed of a quicker one for the model."""
CASES = [(n, i + 1) for i, n in enumerate(MODELS)]


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *((n, SLOW.get((n, seed), seed)) for n, seed in CASES),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in SLOW),
    ],
)
def test_random_strategies_train_exactly(name: str, seed: int) -> None:
    _, graph = _captured(name)
    plan = random_plan(graph, FEW, seed=seed)
    shapes = [(2,), (2, 2)] if seed % 2 else [(), (2,)]
    plan = random_sharding(graph, plan, rp.Cluster.local(8), seed=seed, meshes=shapes)
    assert _worst(name, plan) <= EXACT


@pytest.mark.parametrize(
    ("zero", "replicas"),
    [
        (1, 1),
        (2, 1),
        (3, 2),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((1, 2), (2, 2), (3, 1))),
    ],
)
def test_every_zero_level_trains_exactly(zero: int, replicas: int) -> None:
    _, graph = _captured("gpt")
    plan = random_plan(graph, FEW, seed=3, stages=2, replicas=replicas, microbatches=2)
    plan = random_sharding(graph, plan, MANY, seed=3, meshes=[(2,)], zero=[zero])
    assert {s.memory.zero for s in plan.stages} == {zero}
    assert _worst("gpt", plan) <= EXACT


@pytest.mark.parametrize("mesh", [(2,), pytest.param((2, 2), marks=pytest.mark.thorough)])
def test_clipping_counts_every_element_once(mesh: tuple[int, ...]) -> None:
    batch, graph = _captured("gpt")
    plan = random_plan(graph, FEW, seed=1, stages=2, replicas=1, microbatches=2)
    plan = random_sharding(graph, plan, MANY, seed=1, meshes=[mesh])
    found = run_graph(graph, batch, plan, steps=2, recipe=Recipe(clip_norm=0.01))
    wanted = reference_run(graph, batch, plan, steps=2, recipe=Recipe(clip_norm=0.01))
    assert max(g.ratio for g in gaps(found, wanted)) <= EXACT


def test_random_shardings_repeat_and_use_what_there_is() -> None:
    _, graph = _captured("gpt")
    base = random_plan(graph, FEW, seed=0, stages=2, replicas=1)
    plans = [random_sharding(graph, base, MANY, seed=s) for s in range(12)]
    assert plans == [random_sharding(graph, base, MANY, seed=s) for s in range(12)]
    shapes = {tuple(n for _, n in s.mesh.inner) for p in plans for s in p.stages}
    assert shapes == set(MESHES)
    assert any(len({s.mesh.shape for s in p.stages}) > 1 for p in plans), "no unequal meshes"
    assert {s.memory.zero for p in plans for s in p.stages} == {0, 1, 2, 3}


def test_a_wrong_strategy_is_refused_by_name() -> None:
    batch, graph = _captured("gpt")
    plan = random_plan(graph, FEW, seed=0, stages=1, replicas=1)
    plan = random_sharding(graph, plan, MANY, seed=0, meshes=[(2,)])
    op = next(op.id for op in graph.ops if op.name == "linear")
    wrong = dataclasses.replace(
        plan.stages[0], sharding={op: "S9 R > S9"}, memory=MemoryPolicy("none", 0)
    )
    with pytest.raises(PlanError, match="strategies"):
        run_graph(graph, batch, dataclasses.replace(plan, stages=(wrong,)))


def test_too_few_devices_are_told() -> None:
    _, graph = _captured("mlp")
    plan = random_plan(graph, FEW, seed=0, stages=2, replicas=1)
    with pytest.raises(PlanError, match="the cluster has 2"):
        random_sharding(graph, plan, FEW, meshes=[(4,)])
