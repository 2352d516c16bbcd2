"""A model that does not fit: what it needs, what binds, and what to change."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import PlanError
from raypar.lowered import lower_plan
from raypar.mesh.calibration import table_calibration
from raypar.search.interop.workbench import Workbench
from raypar.search.need import does_not_fit, leanest, need_of
from raypar.search.simulate import simulate


class Tower(nn.Module):
    """Three layers, the second of which is by far the widest."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.last = (
            nn.Linear(64, 64),
            nn.Linear(64, 4096),
            nn.Linear(4096, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.wide(torch.relu(self.narrow(x))))).square().mean()


@cache
def _graph() -> rp.OpGraph:
    return rp.capture(Tower, torch.randn(8, 64))


def _cluster(devices: int, bytes_each: int) -> rp.Cluster:
    (node,) = rp.Cluster.local(devices).nodes
    return rp.Cluster((dataclasses.replace(node, host_memory=devices * bytes_each),), "small")


@pytest.mark.parametrize(
    ("devices", "memory", "leaves"),
    [
        (1, 5_420_000, "leaves 4.88 MB of their 5.42 MB"),
        (2, 2_750_000, "leaves 2.48 MB of their 2.75 MB"),
    ],
)
def test_the_search_says_what_it_needs_what_binds_and_what_would_do(
    devices: int, memory: int, leaves: str
) -> None:
    with pytest.raises(PlanError) as caught:
        rp.plan(_graph(), _cluster(devices, memory), rp.SearchConfig())
    message = str(caught.value)
    assert "the smallest memory that was found for it is" in message
    assert leaves in message
    assert re.search(r"What binds is stage \d .*the largest [a-z]+ there is wide.weight", message)
    match = re.search(r"about (\d+) of this kind", message)
    assert match is not None
    assert int(match[1]) > devices
    assert "\n" not in message


@pytest.mark.parametrize("planner", ["optuna", "alpa", "placement"])
def test_what_no_plan_has_room_for_is_told_without_a_search(
    planner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "__init__", None)  # no search begins
    options = rp.SearchConfig(planner=planner)
    with pytest.raises(PlanError) as caught:
        rp.plan(_graph(), _cluster(2, 200_000), options)
    message = str(caught.value)
    # 303,176 elements of 4 bytes, four times over: with gradients and two states.
    assert "parameters (1.21 MB)" in message
    assert "are 4.85 MB, cut as finely as may be" in message
    assert "leaves 360 kB on 2 devices together" in message
    assert "The largest parameter is wide.weight [4096, 64] (1.05 MB)" in message
    assert "at least 27 of this kind" in message
    leaner = dataclasses.replace(options, optimizer_states=0)
    with pytest.raises(
        PlanError, match=r"gradients are 2\.43 MB.*at least 14 of this kind\) or larger$"
    ):
        rp.plan(_graph(), _cluster(2, 200_000), leaner)


def test_where_little_fits_the_most_frugal_plan_is_found() -> None:
    plan = rp.plan(_graph(), _cluster(1, 5_500_000), rp.SearchConfig(trials=3, seeds=[]))
    assert plan.predicted["peak_bytes"] <= 0.9 * 5_500_000
    assert {stage.memory.recompute for stage in plan.stages} == {"full"}


def test_the_leanest_plan_is_leaner_than_what_uniform_makes() -> None:
    cluster = _cluster(2, 10**9)
    calibration = table_calibration(cluster)
    lean = leanest(_graph(), cluster, rp.SearchConfig(), calibration)
    assert lean is not None
    plan = rp.plan(_graph(), cluster, rp.SearchConfig(planner="uniform", stages=1, replicas=1))
    lowered = lower_plan(_graph(), plan)
    usual = need_of(plan, lowered, simulate(_graph(), plan, cluster, lowered=lowered))
    assert lean.nbytes < 0.8 * usual.nbytes
    assert lean.limit == usual.limit == 10**9


def test_where_only_the_options_forbid_it_the_plan_that_fits_is_named() -> None:
    cluster = _cluster(2, 10**9)
    error = does_not_fit(_graph(), cluster, rp.SearchConfig(), table_calibration(cluster))
    found = re.search(
        r"search.stages: (\d+), search.replicas: (\d+), train.microbatches: (\d+)", str(error)
    )
    assert found is not None
    stages, replicas, microbatches = map(int, found.groups())
    options = rp.SearchConfig(
        planner="uniform", stages=stages, replicas=replicas, microbatches=microbatches,
        recompute="full", zero=3,
    )  # fmt: skip
    assert len(rp.plan(_graph(), cluster, options).stages) == stages


def test_explain_tells_a_plan_that_does_not_fit() -> None:
    cluster = _cluster(2, 200_000)
    plan = rp.plan(_graph(), cluster, rp.SearchConfig(stages=2))
    text = rp.explain(plan, _graph(), cluster)
    assert "MORE THAN THERE IS" in text
    (told,) = re.findall(r"^THIS PLAN DOES NOT FIT: .*\Z", text, re.M | re.S)  # it comes last
    told = " ".join(told.split())
    assert re.search(r"a rank needs [\d.]+ .?B of [\d.]+ .?B; what binds is stage", told)
    assert "search.planner: optuna" in told
    assert "wide.weight" in text
    enough = rp.explain(plan, _graph(), _cluster(2, 10**9))
    assert "DOES NOT FIT" not in enough
