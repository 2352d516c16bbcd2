"""The law under every option of a recipe: any plan trains like a plain loop with torch's tools."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import raypar as rp
from raypar.errors import NonFiniteError
from raypar.graph.autocast import under_autocast
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.recipe import LossScale, Recipe
from raypar.testing import assert_plan_equivalent, models, random_plan, random_sharding
from raypar.testing.backends import start_run
from raypar.testing.equivalence import RunRecord, gaps, reference_run, run_graph
from tests._tiers import examples

FEW, MANY = rp.Cluster.local(2), rp.Cluster.local(8)
EXACT = 1e-9
OVERFLOWS = LossScale(init_scale=2.0**40, backoff_factor=2.0**-28, growth_interval=2)
"""The first step overflows in float16 for certain, the second does not."""


@cache
def captured(name: str) -> tuple[Any, OpGraph]:
    case = models.case(name)
    batch = case.batch(0, 8)
    return batch, rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)


@cache
def in_autocast(name: str, precision: str) -> tuple[Any, OpGraph]:
    case = models.case(name)
    batch = torch.utils._pytree.tree_map(
        lambda t: t.float() if t.is_floating_point() else t, case.batch(0, 8)
    )
    model, loss = under_autocast(
        partial(case.model_fn, dtype=torch.float32), case.loss_fn, precision
    )
    return batch, rp.capture(model, batch, loss, case.batch_dims)


def drawn_plan(graph: OpGraph, seed: int) -> Plan:
    plan = random_plan(graph, FEW, seed=seed)
    return random_sharding(graph, plan, MANY, seed=seed, meshes=[(), (2,)])


def grouped(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """No weight decay, and another learning rate, for biases and norms."""
    named = list(named_parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
        ],
        lr=1e-2,
    )


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2)


def momentum(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, foreach=True)


def fused(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


def tensor_rate(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=torch.tensor(1e-2), foreach=False)


def warm(optimizer: torch.optim.Optimizer) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(
        optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 4)], [2]
    )


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "sequential": warm,
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=8),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.5),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
}


def worst(found: RunRecord, wanted: RunRecord) -> float:
    gap = max(gaps(found, wanted), key=lambda g: g.ratio)
    print(f"worst: {gap.what} {gap.text}")
    return gap.ratio


@settings(max_examples=examples(4, 10), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    name=st.sampled_from(["mlp", "gpt_shared_mask", "masked_mean", "partly_frozen", "sum_loss"]),
    seed=st.integers(0, 99),
    optimizer=st.sampled_from([grouped, momentum, fused, tensor_rate]),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    clip_norm=st.sampled_from([None, 0.05]),
    ema_decay=st.sampled_from([None, 0.0, 0.7]),
    loss_scale=st.sampled_from([None, LossScale(growth_interval=1, growth_factor=3.0)]),
)
def test_any_recipe_on_any_plan(
    name: str, seed: int, optimizer: Any, scheduler: str, **options: Any
) -> None:
    batch, graph = captured(name)
    recipe = Recipe(scheduler=SCHEDULERS[scheduler], **options)
    arguments: dict[str, Any] = {"optimizer": optimizer, "recipe": recipe, "steps": 4}
    plan = drawn_plan(graph, seed)
    wanted = reference_run(graph, batch, plan, **arguments)
    assert worst(run_graph(graph, batch, plan, **arguments), wanted) <= EXACT
    assert bool(wanted.average) == (recipe.ema_decay is not None)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.thorough), 3])
def test_all_of_a_recipe_at_once_on_cut_optimizer_state(zero: int) -> None:
    batch, graph = captured("gpt_shared_mask")
    plan = random_plan(graph, FEW, seed=3, stages=2, replicas=2, microbatches=2)
    plan = random_sharding(graph, plan, MANY, seed=3, meshes=[(2,)], zero=[zero])
    recipe = Recipe(0.05, warm, 0.7, LossScale(growth_interval=2))
    arguments: dict[str, Any] = {"optimizer": grouped, "recipe": recipe, "steps": 4}
    wanted = reference_run(graph, batch, plan, **arguments)
    assert worst(run_graph(graph, batch, plan, **arguments), wanted) <= EXACT
    assert len(set(wanted.rates)) == 4
    assert wanted.scales == [65536.0, 65536.0, 131072.0, 131072.0]
    moved = max(float((wanted.average[n] - t).abs().max()) for n, t in wanted.state_dict.items())
    assert moved > 1e-4


class Normed(nn.Module):
    """Batch norm, so that a step that is skipped shows in buffers, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)))).square().mean()


def rows() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def test_a_step_that_overflows_is_skipped_on_all_ranks_alike() -> None:
    model, _ = under_autocast(Normed, None, "fp16")
    graph = rp.capture(model, rows())
    recipe = Recipe(0.05, SCHEDULERS["exponential"], 0.5, OVERFLOWS)
    arguments: dict[str, Any] = {"optimizer": sgd, "recipe": recipe, "steps": 5}
    for seed in range(3):
        plan = random_plan(graph, FEW, seed=seed, stages=2, microbatches=2)
        wanted = reference_run(graph, rows(), plan, **arguments)
        found = run_graph(graph, rows(), plan, **arguments)
        assert worst(found, wanted) <= 2e-3
        assert found.skipped == [True, False, False, False, False]
        assert found.rates == [0.01, 0.01, 0.005, 0.0025, 0.00125]
        assert found.scales == [2.0**40, 2.0**12, 2.0**12, 2.0**13, 2.0**13]
        assert int(found.state_dict["norm.num_batches_tracked"]) == 10


def test_a_loss_that_no_scale_cures_ends_the_run_and_says_so() -> None:
    graph = rp.capture(Normed, rows())
    plan = random_plan(graph, FEW, seed=1, stages=2, replicas=1, microbatches=2)
    recipe = Recipe(loss_scale=LossScale(max_skips=3))
    specs = compile_plan(graph, plan, optimizer=sgd, recipe=recipe)
    seen = []
    with start_run("local", specs, [rows() * float("inf")]) as run:
        before = run.state_dict()
        with pytest.raises(
            NonFiniteError, match=r"step 3: .*3 steps before it .* from 65536 to 8192.*no smaller"
        ):
            run.train(0, 10, seen.append)
        after = run.state_dict()
    assert [(r.applied, r.skipped) for r in seen] == [(False, True)] * 3 + [(False, False)]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_is_exact_where_ranks_compute_what_one_process_does(precision: str) -> None:
    batch, graph = in_autocast("gpt_shared_mask", precision)
    plan = random_plan(graph, FEW, seed=1, stages=3, replicas=1, microbatches=1)
    scale = LossScale() if precision == "fp16" else None
    arguments: dict[str, Any] = {
        "optimizer": sgd,
        "recipe": Recipe(ema_decay=0.5, loss_scale=scale),
    }
    wanted = reference_run(graph, batch, plan, **arguments)
    assert worst(run_graph(graph, batch, plan, **arguments), wanted) <= 1e-7
    assert {t.dtype for t in wanted.state_dict.values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "seed", "precision", "bound"),
    [
        ("gpt_shared_mask", 2, "fp16", 2e-3),
        ("masked_mean", 3, "bf16", 2e-2),
        pytest.param("gpt_shared_mask", 2, "bf16", 2e-2, marks=pytest.mark.thorough),
        pytest.param("masked_mean", 3, "fp16", 2e-3, marks=pytest.mark.thorough),
    ],
)
def test_autocast_on_any_plan(name: str, seed: int, precision: str, bound: float) -> None:
    batch, graph = in_autocast(name, precision)
    scale = LossScale() if precision == "fp16" else None
    recipe = Recipe(0.5, warm, 0.5, scale)
    plan = drawn_plan(graph, seed)
    arguments: dict[str, Any] = {"optimizer": sgd, "recipe": recipe}
    wanted = reference_run(graph, batch, plan, **arguments)
    assert worst(run_graph(graph, batch, plan, **arguments), wanted) <= bound
    plain_batch, plain = captured(name)
    told_apart = reference_run(plain, plain_batch, plan, **arguments).losses[0]
    assert abs(told_apart - wanted.losses[0]) > 1e-6  # it did run in the lower precision


class Mixed(nn.Module):
    """Enters autocast itself, leaves it inside, and shares a weight between both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.first(x))
            with torch.autocast("cpu", enabled=False):
                z = self.shared(y.float())
            y = self.shared(y) + z
        return self.shared(y.float()).square().mean()


def test_a_model_that_enters_autocast_itself() -> None:
    batch = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    graph = rp.capture(Mixed, batch)
    dtypes = {op.id: op.dtypes for op in graph.ops if op.name == "linear"}
    assert [d[0] for d in dtypes.values()] == ["bfloat16", "float32", "bfloat16", "float32"]
    for seed in range(3):
        assert_plan_equivalent(Mixed, batch, drawn_plan(graph, seed), optimizer=sgd)


@pytest.mark.thorough
@pytest.mark.thorough  # the recipe on threads, and a recipe of the trainer's on Ray, are not
def test_the_recipe_on_ray(ray_session: str) -> None:
    assert ray_session
    model, _ = under_autocast(Normed, None, "fp16")
    graph = rp.capture(model, rows())
    plan = random_plan(graph, FEW, seed=1, stages=2, replicas=1, microbatches=2)
    recipe = Recipe(0.05, warm, 0.5, OVERFLOWS)
    arguments: dict[str, Any] = {"optimizer": grouped, "recipe": recipe, "steps": 4}
    found = run_graph(graph, rows(), plan, backend="ray", **arguments)
    assert worst(found, reference_run(graph, rows(), plan, **arguments)) <= 2e-2
    assert found.skipped == [True, False, False, False]
