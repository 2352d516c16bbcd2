"""What a rank observes of its own step."""

from __future__ import annotations

import torch
from torch import nn

import raypar
from raypar.stages.compile import compile_plan
from raypar.stages.meters import SavedMeter
from raypar.stages.run import StepResult
from raypar.testing.backends import start_run


def test_storages_that_stages_share_count_once_for_the_rank() -> None:
    meter = SavedMeter()
    shared, own, third = torch.zeros(100), torch.zeros(10), torch.zeros(1000)
    meter.hold(0, 0, [shared, own], free=[])
    meter.hold(1, 0, [shared[:50], third], free=[])
    assert meter.peaks == {0: 440, 1: 4400}
    assert meter.most == 4440
    meter.drop(1, 0)
    meter.hold(0, 1, [torch.zeros(5)], free=[])
    assert meter.peaks[0] == 460
    assert meter.most == 4440


def test_seconds_in_the_programs_of_every_stage_add_up_to_those_of_the_rank() -> None:
    def model() -> nn.Module:
        layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())]
        return nn.Sequential(*layers)

    batch = (torch.zeros(8, 8), torch.zeros(8, dtype=torch.int64))
    graph = raypar.capture(model, batch, nn.functional.cross_entropy)
    options = raypar.SearchConfig(planner="uniform", stages=4, chunks=2, microbatches=2)
    plan = raypar.plan(graph, raypar.Cluster.local(2), options)
    results: list[StepResult] = []
    with start_run("local", compile_plan(graph, plan, optimizer=torch.optim.SGD), batch) as run:
        run.train(0, 2, results.append)
    for result in results:
        assert [sorted(r.passes) for r in result.ranks] == [[0, 2], [1, 3]]
        for rank in result.ranks:
            passes = list(rank.passes.values())
            assert all(seconds > 0 for both in passes for seconds in both)
            assert abs(sum(map(sum, passes)) - rank.seconds["compute"]) < 1e-9
    first, second = ([r.most_saved for r in result.ranks] for result in results)
    assert all(n > 0 for n in first)
    assert second == [0, 0]
