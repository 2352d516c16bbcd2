"""Parts of the recipe, each beside what torch has for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import raypar as rp
from raypar.errors import ConfigError, OptimizerError
from raypar.stages.compile import compile_plan
from raypar.stages.loss_scale import LossScaler
from raypar.stages.optimizers import build_optimizer, empty_optimizer
from raypar.stages.plain import from_plain, to_plain
from raypar.stages.recipe import LossScale, Recipe
from raypar.stages.update import build_scheduler, scheduler_state, step_scheduler
from raypar.testing import random_plan
from raypar.testing.backends import start_run
from raypar.train.optimizer import check_recipe
from tests._tiers import examples

CPU = torch.device("cpu")
FORMS = {
    "a.weight": ((4, 3), "float32", True),
    "a.bias": ((4,), "float32", True),
    "b.weight": ((2, 4), "float32", True),
    "b.bias": ((2,), "float32", True),
}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Recipe(clip_norm=0.0), "clip_norm is 0.0"),
        (lambda: Recipe(clip_norm=float("nan")), "clip_norm is nan"),
        (lambda: Recipe(ema_decay=1.0), r"ema_decay is 1.0; give a value in \[0, 1\)"),
        (lambda: Recipe(scheduler=3), "scheduler is 3; every rank needs its own"),
        (lambda: LossScale(init_scale=0.0), "init_scale is 0.0"),
        (lambda: LossScale(growth_factor=1.0), "growth_factor is 1.0; give a value above 1"),
        (lambda: LossScale(backoff_factor=1.0), "backoff_factor is 1.0"),
        (lambda: LossScale(growth_interval=0), "growth_interval is 0"),
        (lambda: LossScale(max_skips=0), "max_skips is 0"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


@settings(max_examples=examples(13, 40))
@given(
    verdicts=st.lists(st.booleans(), max_size=16),
    scale=st.floats(1e-3, 1e30),
    growth=st.floats(1.01, 1e4),
    backoff=st.floats(0.01, 0.99),
    interval=st.integers(1, 4),
)
def test_the_loss_scale_is_that_of_torchs_scaler(
    verdicts: list[bool], scale: float, growth: float, backoff: float, interval: int
) -> None:
    rule = LossScale(scale, growth, backoff, interval, max_skips=100)
    mine = LossScaler(rule)
    theirs = torch.amp.GradScaler("cpu", scale, growth, backoff, interval)
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    for at, finite in enumerate(verdicts):
        theirs.scale(param.sum())  # makes its tensors, in float32, at the first step
        assert mine.scale == theirs.get_scale()
        param.grad = torch.full((1,), 1.0 if finite else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        if finite:
            mine.applied()
        else:
            assert mine.overflowed()
        if at == len(verdicts) // 2:  # a resume in the middle changes nothing
            again = LossScaler(rule)
            again.load(json.loads(json.dumps(mine.state())))
            mine = again
    assert not verdicts or mine.scale == theirs.get_scale()


# -- groups ---------------------------------------------------------------------------------


def by_name(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    named = list(named_parameters)
    return torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in named if n.endswith("weight")]},
            {"params": [(n, p) for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ]
    )


def by_width(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p], "lr": 1.0 / p.shape[-1]} for p in params])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (by_name, [["a.weight"], []]),
        (by_width, [["a.weight"], [], [], []]),
        (torch.optim.Adagrad, [["a.weight"]]),
        (partial(torch.optim.AdamW, fused=True), [["a.weight"]]),
        (lambda params: torch.optim.SGD(params, lr=0.1), [["a.weight"]]),
    ],
)
def test_a_rank_has_the_groups_of_the_whole_model(make: Any, expected: list[list[str]]) -> None:
    held = {"a.weight": nn.Parameter(torch.ones(2, 3))}  # half of it
    made = build_optimizer(make, FORMS, held, CPU)
    whole, names = empty_optimizer(make, FORMS)
    assert sum(map(len, names)) == len(FORMS)
    assert [[n for n, p in held.items() if any(p is q for q in g["params"])]
            for g in made.param_groups] == expected  # fmt: skip
    assert [g.get("param_names", found) for g, found in
            zip(made.param_groups, expected, strict=True)] == expected  # fmt: skip
    for mine, theirs in zip(made.param_groups, whole.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("param")} == {
            k: v for k, v in theirs.items() if not k.startswith("param")
        }
    assert set(made.state) <= {held["a.weight"]}
    held["a.weight"].grad = torch.ones(2, 3)
    made.step()
    assert not torch.equal(held["a.weight"], torch.ones(2, 3))
    build_optimizer(make, FORMS, {}, CPU).step()  # a rank without parameters


def test_groups_that_cannot_be_the_same_everywhere_are_refused() -> None:
    def by_values(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [p for p in params if p.shape[0] == 4], [p for p in params if p.shape[0] != 4]
        return torch.optim.SGD([{"params": g} for g in groups if g])

    with pytest.raises(OptimizerError, match=r"made 2 parameter groups .* and 1 from what a rank"):
        build_optimizer(by_values, FORMS, {}, CPU)
    with pytest.raises(OptimizerError, match="of parameters that it was not given"):
        empty_optimizer(lambda params: torch.optim.SGD([nn.Parameter(torch.ones(1))]), FORMS)


# -- schedulers -----------------------------------------------------------------------------


class Warmup:
    """A schedule with values of its own."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (1 + step) / self.steps)


SCHEDULERS: list[Any] = [
    lambda o: lr_scheduler.LambdaLR(o, Warmup(3)),
    lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    lambda o: lr_scheduler.ConstantLR(o),
    lambda o: lr_scheduler.LinearLR(o),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.PolynomialLR(o),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False, scale_fn=lambda x: 0.5**x),
    lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.LambdaLR(o, lambda step: 0.5)], [2]
    ),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_every_scheduler_goes_on_where_it_was(make: Any) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, build_scheduler(make, optimizer)

    (optimizer, mine), (other, resumed) = fresh(), fresh()
    for _ in range(4):
        optimizer.step()
        step_scheduler(mine, 1.0)
    saved = json.loads(json.dumps(scheduler_state(mine), allow_nan=False))
    assert saved["type"] == type(mine).__name__
    resumed.load_state_dict(from_plain(saved["state"]))
    for mine_group, group in zip(optimizer.param_groups, other.param_groups, strict=True):
        group.update({k: v for k, v in mine_group.items() if k != "params"})
    other.step()
    for _ in range(4):
        step_scheduler(mine, 1.0)
        step_scheduler(resumed, 1.0)
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        assert other.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]


KEYS = st.one_of(st.text(max_size=5), st.integers(), st.none())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


@given(VALUES)
def test_plain_values_come_back(value: Any) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(value, "it"), allow_nan=False))) == value


@pytest.mark.parametrize(
    "value",
    [{"$tuple": 3}, {"$no": []}, {"$pairs": [[1]]}, {"$float": "1"}, {"$tuple": [], "b": 1}],
)
def test_plain_values_that_nothing_writes_are_refused(value: Any) -> None:
    with pytest.raises(OptimizerError, match="which nothing writes"):
        from_plain(value)


class Opaque(lr_scheduler.LambdaLR):
    """A scheduler that cannot be saved."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.what = object()
        super().__init__(optimizer, lambda step: 1.0)


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        (lambda o: 3, "returned int, not a scheduler"),
        (lambda o: lr_scheduler.StepLR(o), "raised TypeError"),
        (
            lambda o: lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 1),
            "StepLR of another optimizer",
        ),
        (lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1.0] * 2), r"raised ValueError.*\(1 param"),
        (Opaque, r"scheduler Opaque\.what is a object, which a checkpoint cannot hold"),
    ],
)
def test_these_schedulers_are_refused_before_anything_starts(scheduler: Any, text: str) -> None:
    with pytest.raises(OptimizerError, match=text):
        check_recipe(torch.optim.SGD, Recipe(scheduler=scheduler), FORMS)


def test_loss_scaling_of_float16_parameters_is_refused() -> None:
    forms = {"w": ((2,), "float16", True), "frozen": ((2,), "float16", False)}
    with pytest.raises(OptimizerError, match="'w' and 0 other trained parameters are float16"):
        check_recipe(torch.optim.SGD, Recipe(loss_scale=LossScale()), forms)
    check_recipe(torch.optim.SGD, Recipe(), forms)


# -- state of a run -------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_the_state_of_a_recipe_is_the_same_on_every_rank_and_for_every_plan() -> None:
    batch = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    graph = rp.capture(net, batch, square)
    recipe = Recipe(
        None, partial(lr_scheduler.ExponentialLR, gamma=0.5), 0.9, LossScale(growth_interval=3)
    )
    optimizer = partial(torch.optim.SGD, lr=0.25, momentum=0.5)
    plans = [
        random_plan(graph, rp.Cluster.local(4), stages=stages, replicas=replicas, microbatches=1)
        for stages, replicas in ((1, 1), (2, 2))
    ]
    first, second = (compile_plan(graph, p, optimizer=optimizer, recipe=recipe) for p in plans)
    with start_run("local", first, [batch]) as run:
        run.train(0, 4)
        (state,) = run.call("recipe_state")
    state = json.loads(json.dumps(state))
    seen: list[Any] = []
    with start_run("local", second, [batch]) as run:
        run.call("load_recipe_state", state)
        assert run.call("recipe_state") == [state] * 4
        run.train(4, 2, seen.append)
    assert [[(r.lr, r.loss_scale) for r in s.ranks] for s in seen] == [
        [(0.25 / 16, 2.0**17)] * 4,
        [(0.25 / 32, 2.0**17)] * 4,
    ]
    for damaged in ({}, {**state, "groups": [{"params": 1}]}, {**state, "loss_scale": []}):
        with (
            start_run("local", first, [batch]) as run,
            pytest.raises(OptimizerError, match="is damaged, or of another version"),
        ):
            run.call("load_recipe_state", damaged)
    other = compile_plan(graph, plans[0], optimizer=torch.optim.AdamW, recipe=Recipe(ema_decay=0.5))
    with (
        start_run("local", other, [batch]) as run,
        pytest.raises(
            OptimizerError,
            match=r"optimizer: it was trained with SGD, this run makes AdamW: make SGD; scheduler: "
            r"it holds the state of ExponentialLR, this run sets none: set ExponentialLR.*; "
            r"loss_scale: it holds one, .* set precision=.fp16.",
        ),
    ):
        run.call("load_recipe_state", state)
