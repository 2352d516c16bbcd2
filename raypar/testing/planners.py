"""Conformance suite for planners; a third party's planner can run it too.

    import pytest
    from raypar.testing.planners import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_planner(check):
        check(MyPlanner())

The checks use a small model of independent layers, on clusters of one and more nodes, with and
without a cluster at hand.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from raypar.errors import ConfigError, PlanError
from raypar.fit import check_plan
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import Planner
from raypar.testing.equivalence import assert_plan_equivalent

_WIDTH = 8
_LAYERS = 6


def stack() -> nn.Module:
    """The model that the checks plan for: six equal layers."""
    layers = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh()) for _ in range(_LAYERS)]
    return nn.Sequential(*layers).double()


def _mean_square(out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


class _Correlated(nn.Module):
    """Samples meet: one replica only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) @ self.layers(x).T).square().mean()


def _batch(samples: int) -> torch.Tensor:
    return torch.randn(samples, _WIDTH, generator=torch.Generator().manual_seed(0)).double()


@cache
def _graph(samples: int = 8) -> OpGraph:
    return capture(stack, _batch(samples), _mean_square)


def _clusters() -> list[Cluster]:
    return [
        *(Cluster.local(n) for n in (1, 2, 3, 4)),
        Cluster.virtual(nodes=2, devices_per_node=2, device="A100-40"),
    ]


def plans_fit(planner: Planner) -> None:
    """Every plan fits its graph and its cluster, and survives its JSON form."""
    for cluster in _clusters():
        for samples in (1, 6, 8):
            plan = planner.plan(_graph(samples), cluster, SearchConfig(planner=planner.name))
            check_plan(plan, _graph(samples), cluster)
            assert Plan.from_json(plan.to_json()) == plan
            assert plan.planner == planner.name, plan.planner


def plans_repeat(planner: Planner) -> None:
    """Equal questions get equal plans."""
    cluster, config = Cluster.local(4), SearchConfig(planner=planner.name)
    first = planner.plan(_graph(), cluster, config)
    assert first.diff(planner.plan(_graph(), cluster, config)) == []


def plans_do_as_told(planner: Planner) -> None:
    """What the config fixes is in the plan."""
    cluster = Cluster.local(4)
    for stages, replicas, parts in ((1, 1, 1), (2, 2, 2), (4, 1, 8), (3, 1, 4), (1, 4, 2)):
        told = SearchConfig(
            planner=planner.name, stages=stages, replicas=replicas, microbatches=parts,
            schedule="gpipe", recompute="full",
        )  # fmt: skip
        plan = planner.plan(_graph(), cluster, told)
        found = (len(plan.stages), plan.replicas, plan.microbatches)
        assert found == (stages, replicas, parts), f"asked for {stages, replicas, parts}: {found}"
        assert plan.schedule.name == "gpipe"
        assert {stage.memory.recompute for stage in plan.stages} == {"full"}


def plans_keep_the_recipe(planner: Planner) -> None:
    """Where samples meet there is one replica, and M is the user's, not the planner's."""
    graph = capture(_Correlated, _batch(8).clone())
    plan = planner.plan(graph, Cluster.local(4), SearchConfig(planner=planner.name))
    assert (plan.replicas, plan.microbatches) == (1, 1), (plan.replicas, plan.microbatches)
    told = SearchConfig(planner=planner.name, microbatches=4)
    assert planner.plan(graph, Cluster.local(4), told).microbatches == 4


def refusals_are_plan_errors(planner: Planner) -> None:
    """What cannot be is refused with a PlanError that names a key."""
    for wrong in (
        {"stages": 0}, {"stages": 10_000}, {"replicas": 0}, {"replicas": 5}, {"microbatches": 3},
        {"microbatches": 0}, {"stages": 4, "replicas": 4}, {"recompute": "never"},
        {"schedule": "no such"},
    ):  # fmt: skip
        config = SearchConfig(planner=planner.name, **wrong)  # type: ignore[arg-type]
        try:
            planner.plan(_graph(), Cluster.local(4), config)
        except (PlanError, ConfigError) as error:
            if not any(key in str(error) for key in (*wrong, "batch")):
                raise AssertionError(f"{wrong} is refused, but no key is named: {error}") from None
        else:
            raise AssertionError(f"{planner.name} made a plan for {wrong}")


def plans_train_exactly(planner: Planner) -> None:
    """A plan trains like the unsplit model."""
    for samples in (6, 8):
        plan = planner.plan(_graph(samples), Cluster.local(4), SearchConfig(planner=planner.name))
        assert_plan_equivalent(stack, _batch(samples), plan, loss_fn=_mean_square, steps=2)


def plans_without_ray(planner: Planner) -> None:
    """The planner's module can be imported where Ray cannot."""
    module = type(planner).__module__
    code = f"import sys; sys.modules['ray'] = None; sys.path[:0] = {sys.path!r}; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CHECKS: tuple[Callable[[Planner], None], ...] = (
    plans_fit,
    plans_repeat,
    plans_do_as_told,
    plans_keep_the_recipe,
    refusals_are_plan_errors,
    plans_train_exactly,
    plans_without_ray,
)
"""Every check of the suite; each raises if the planner fails it."""
