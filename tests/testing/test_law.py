"""The law of the house on a few models: a plan trains exactly like the unsplit model.

`release/equivalence.py` runs it on every model of the zoo with many more plans.
"""

from __future__ import annotations

import inspect
import itertools
from functools import cache

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import ConfigError, PlanError
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.schedules.registry import schedule_names
from raypar.stages.recipe import Recipe
from raypar.testing import assert_plan_equivalent, models, random_plan, run_plan
from raypar.testing.equivalence import gaps, reference_run, run_graph, tolerance

CLUSTER = rp.Cluster.local(4)
EXACT = 1e-9


@cache
def _captured(name: str, samples: int = 8):
    case = models.case(name)
    batch = case.batch(0, samples)
    return case, batch, rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)


def _worst(found, wanted) -> float:
    gap = max(gaps(found, wanted), key=lambda g: g.ratio)
    print(f"worst: {gap.what} {gap.text}")
    return gap.ratio


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2)


MODELS = (
    "mlp", "sum_loss", "partly_frozen", "siamese", "keyword_only", "cnn", "dlrm", "masked_mean",
    "contrastive", "gru_time_major", "gpt",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(n, 3 * i + k, marks=[pytest.mark.thorough] * k)
        for i, n in enumerate(MODELS)
        for k in (0, 1)
    ],
)
def test_random_plans_train_exactly(name, seed):
    _, batch, graph = _captured(name)
    plan = random_plan(graph, CLUSTER, seed=seed)
    wanted = reference_run(graph, batch, plan)
    assert _worst(run_graph(graph, batch, plan), wanted) <= EXACT
    assert len(wanted.losses) == 3


@pytest.mark.parametrize("schedule", schedule_names())
@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_every_schedule_trains_exactly(schedule, replicas):
    _, batch, graph = _captured("mlp")
    plan = random_plan(
        graph, CLUSTER, seed=replicas, stages=4, replicas=replicas, microbatches=4,
        schedules=[schedule],
    )  # fmt: skip
    assert (plan.schedule.name, plan.replicas) == (schedule, replicas)
    assert _worst(run_graph(graph, batch, plan), reference_run(graph, batch, plan)) <= EXACT


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        *((policy, "1f1b") for policy in RECOMPUTE_POLICIES),
        *(
            pytest.param(p, "zero_bubble_h1", marks=[pytest.mark.thorough] * (p != "selective"))
            for p in RECOMPUTE_POLICIES
        ),
    ],
)
def test_every_recompute_policy_trains_exactly(policy, schedule):
    _, batch, graph = _captured("gpt_shared_mask")
    search = rp.SearchConfig(
        stages=2, replicas=2, microbatches=2, recompute=policy, schedule=schedule
    )
    plan = rp.plan(graph, CLUSTER, search)
    assert _worst(run_graph(graph, batch, plan), reference_run(graph, batch, plan)) <= EXACT


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_masked_mean_is_the_same_for_every_m(parts):
    _, batch, graph = _captured("masked_mean")
    wanted = reference_run(graph, batch, random_plan(graph, CLUSTER, microbatches=1))
    for replicas in {1, min(2, 8 // parts)}:
        plan = random_plan(graph, CLUSTER, stages=2, replicas=replicas, microbatches=parts)
        assert _worst(run_graph(graph, batch, plan), wanted) <= EXACT


class _Dropouts(nn.Module):
    """A row of parameters for each sample, so that their gradients show the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(16, 256), nn.Embedding(16, 256)
        self.drop_first, self.drop_second = nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, samples):
        both = self.drop_first(self.first(samples)) + self.drop_second(self.second(samples))
        return both.sum(1).mean()


def test_dropout_draws_per_step_op_and_sample_and_is_the_same_for_every_plan():
    batch = torch.arange(16)
    graph = rp.capture(_Dropouts, batch)
    plans = [random_plan(graph, CLUSTER, seed=s, stages=n) for s, n in enumerate((1, 2, 3, 2))]
    records = [run_graph(graph, batch, plan, optimizer=sgd) for plan in plans]
    names = ("first.weight", "second.weight")
    masks = torch.stack([torch.stack([g[n] != 0 for n in names]) for g in records[0].gradients])
    assert masks.shape == (3, 2, 16, 256)
    assert abs(masks.double().mean() - 0.7) <= 4 * (0.21 / masks.numel()) ** 0.5
    assert len(masks.flatten(0, 2).unique(dim=0)) == 3 * 2 * 16
    for record in records[1:]:
        assert _worst(record, records[0]) <= 1e-6  # float32; another mask would be off by 0.1
        for step, other in zip(record.gradients, records[0].gradients, strict=True):
            assert all(torch.equal(step[n] != 0, other[n] != 0) for n in names)


def test_other_seeds_draw_other_masks():
    batch = torch.arange(16)
    graph = rp.capture(_Dropouts, batch)
    plan = random_plan(graph, CLUSTER, stages=2)
    zeros = [
        run_graph(graph, batch, plan, steps=1, seed=seed).gradients[0]["first.weight"] == 0
        for seed in (0, 1)
    ]
    assert not torch.equal(*zeros)


def test_a_model_with_dropout_trains_like_its_one_stage_plan():
    _, batch, graph = _captured("gpt_dropout")
    plan = random_plan(graph, CLUSTER, seed=2, stages=2, replicas=2, microbatches=2)
    assert _worst(run_graph(graph, batch, plan), reference_run(graph, batch, plan)) <= EXACT


def test_clipping_is_torchs_clip_grad_norm():
    _, batch, graph = _captured("gpt_shared_mask")
    plan = random_plan(graph, CLUSTER, seed=3, stages=3, replicas=2, microbatches=2)
    plain = run_graph(graph, batch, plan, optimizer=sgd)
    norm = torch.cat([g.flatten() for g in plain.gradients[0].values()]).norm()
    limit = float(norm) / 3
    found = run_graph(graph, batch, plan, optimizer=sgd, recipe=Recipe(clip_norm=limit))
    wanted = reference_run(graph, batch, plan, optimizer=sgd, recipe=Recipe(clip_norm=limit))
    assert _worst(found, wanted) <= EXACT
    assert _worst(found, plain) > 1e-6


def test_a_float32_model():
    case, batch, _ = _captured("mlp")

    def model():
        return case.model_fn(dtype=torch.float32)

    inputs, target = batch
    batch = (inputs.float(), target.float() if target.is_floating_point() else target)
    graph = rp.capture(model, batch, case.loss_fn)
    assert tolerance(graph) == 1e-6
    plan = random_plan(graph, CLUSTER, seed=4, stages=3, replicas=2, microbatches=2)
    assert_plan_equivalent(model, batch, plan, loss_fn=case.loss_fn, optimizer=sgd)


# -- the public functions ---------------------------------------------------------------------


def test_their_signatures_are_frozen():
    plan = inspect.signature(random_plan).parameters
    assert [(p.name, p.default) for p in plan.values()] == [
        ("graph", inspect.Parameter.empty), ("cluster", inspect.Parameter.empty), ("seed", 0),
        ("stages", None), ("replicas", None), ("microbatches", None), ("schedules", None),
    ]  # fmt: skip
    promised = {"loss_fn": None, "optimizer": None, "steps": 3, "backend": "local"}
    for function, more in ((run_plan, {}), (assert_plan_equivalent, {"rtol": None})):
        found = inspect.signature(function).parameters
        assert list(found)[:3] == ["model_fn", "batch", "plan"]
        rest = {n: p for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert len(rest) == len(found) - 3
        assert all(p.default is not inspect.Parameter.empty for p in rest.values())
        assert {n: rest[n].default for n in promised | more} == promised | more


def test_run_plan_gives_a_record_that_an_outsider_can_compare():
    torch.manual_seed(7)
    inputs, target = torch.randn(8, 4).double(), torch.randn(8, 2).double()

    def model():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    graph = rp.capture(model, (inputs, target), nn.functional.mse_loss)
    plan = random_plan(graph, CLUSTER, stages=2, replicas=2, microbatches=2)
    record = run_plan(
        model, (inputs, target), plan, loss_fn=nn.functional.mse_loss, optimizer=sgd, steps=2
    )
    torch.manual_seed(0)
    mine = model()
    optimizer = sgd(mine.parameters())
    for step in range(2):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(mine(inputs), target)
        loss.backward()
        assert isinstance(record.losses[step], float)
        assert abs(record.losses[step] - loss.item()) < 1e-12
        assert record.gradients[step]
        assert all(
            torch.allclose(record.gradients[step][n], p.grad, rtol=0, atol=1e-12)
            for n, p in mine.named_parameters()
        )
        optimizer.step()
    assert list(record.state_dict) == list(mine.state_dict())
    mine.load_state_dict(record.state_dict)


def test_a_plan_for_another_batch_and_an_unknown_backend_are_refused():
    case, batch, graph = _captured("mlp")
    plan = random_plan(graph, CLUSTER)
    with pytest.raises(PlanError, match="another graph"):
        run_plan(case.model_fn, case.batch(0, 4), plan, loss_fn=case.loss_fn)
    with pytest.raises(ConfigError, match="local, ray"):
        run_graph(graph, batch, plan, backend="thread")


# -- the space of plans -----------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 7, 20, 123, 1_000_000, 2**40 + 3, -10])
def test_twenty_seeds_cover_the_space(start):
    _, _, graph = _captured("gpt")
    plans = [random_plan(graph, CLUSTER, seed=seed) for seed in range(start, start + 20)]
    assert sum(len(p.stages) >= 2 for p in plans) >= 15
    assert sum(p.replicas == 2 for p in plans) >= 8
    assert len({p.microbatches for p in plans}) >= 4
    assert {p.schedule.name for p in plans} == set(schedule_names())
    policies = {s.memory.recompute for p in plans for s in p.stages}
    assert policies == set(RECOMPUTE_POLICIES)
    assert len({p.to_json() for p in plans}) == 20


def test_plans_repeat_and_spread_over_places():
    _, _, graph = _captured("gpt")
    plans = [random_plan(graph, CLUSTER, seed=seed) for seed in range(60)]
    assert plans == [random_plan(graph, CLUSTER, seed=seed) for seed in range(60)]
    split = [p for p in plans if len(p.stages) > 1]
    assert len({s.last for p in split for s in p.stages}) > 40
    owners = [[group for group, _ in p.schedule.placement] for p in split]
    assert any(len(o) > len(set(o)) for o in owners), "no rank holds several stages"
    assert any(o != sorted(o) for o in owners)
    assert any(a == b for o in owners for a, b in itertools.pairwise(o))
    assert any(p.devices != tuple(range(len(p.devices))) for p in plans)


def test_what_is_asked_for_is_what_comes():
    _, _, graph = _captured("gpt")
    for stages, replicas, parts in itertools.product((1, 3, 6), (1, 2, 4), (1, 2)):
        plan = random_plan(
            graph, CLUSTER, stages=stages, replicas=replicas, microbatches=parts,
            schedules=["gpipe"],
        )  # fmt: skip
        assert (len(plan.stages), plan.replicas, plan.microbatches) == (stages, replicas, parts)
        assert plan.schedule.name == "gpipe"
    assert {random_plan(graph, CLUSTER, seed=s, microbatches=8).replicas for s in range(9)} == {1}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"stages": 0}, "take 1 to"), ({"stages": 9999}, "take 1 to"),
        ({"replicas": 0}, "take 1 to 4"), ({"replicas": 5}, "take 1 to 4"),
        ({"replicas": 3}, "3 replicas"), ({"microbatches": 3}, "microbatches=2 works"),
        ({"microbatches": 0}, "at least 1"), ({"schedules": ["1f1c"]}, "Did you mean '1f1b'"),
        ({"schedules": []}, "none is named"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(asked, text):
    _, _, graph = _captured("gpt")
    with pytest.raises(PlanError, match=text):
        random_plan(graph, CLUSTER, **asked)


def test_where_samples_meet_there_is_one_replica():
    _, _, graph = _captured("cnn")
    plans: list[Plan] = [random_plan(graph, CLUSTER, seed=seed) for seed in range(20)]
    assert {p.replicas for p in plans} == {1}
    with pytest.raises(PlanError, match="samples meet"):
        random_plan(graph, CLUSTER, replicas=2)
