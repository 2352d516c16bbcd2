"""Ranks that read their own rows: the law holds, nothing is sent, and every rank ends alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raypar as rp
from raypar.comm.local import LocalWorld
from raypar.errors import DataError
from raypar.stages.compile import compile_plan
from raypar.stages.local import LocalRun
from raypar.testing import random_plan
from raypar.train._own_rows import OwnRows
from raypar.train.data import BatchForm, batches, peek
from raypar.train.feed import DataFeed, HeldBatches
from tests.stages.fakes import fake_specs
from tests.train.data.sources import Numbered


class Digits(Numbered):
    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(6, generator=generator).double(), torch.tensor(index % 3)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()


def optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


def eager(data: Any, steps: int, size: int) -> list[float]:
    """Losses of one process that is given the same batches."""
    torch.manual_seed(0)
    reference = model()
    rule = optimizer(reference.parameters())
    losses = []
    opened = peek(data, 0)
    stream = opened.read(size)
    for _ in range(steps):
        (x, y), _ = next(stream)
        loss = nn.functional.cross_entropy(reference(x), y)
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(float(loss.detach()))
    return losses


def planned(data: Any, seed: int, accumulate: int = 1) -> list[float]:
    """Losses of a random plan on the same data."""
    opened = peek(data, 0, accumulate=accumulate)
    graph = rp.capture(model, opened.example, nn.functional.cross_entropy)
    plan = random_plan(graph, rp.Cluster.local(4), seed=seed, stages=2, replicas=2)
    specs = compile_plan(graph, plan, optimizer=optimizer, seed=0)
    losses: list[float] = []
    feed = DataFeed(HeldBatches(opened), BatchForm(opened.example), specs)
    with LocalRun(specs, feed=feed) as run:
        run.train(0, 4, lambda result: losses.append(float(result.loss or 0)))
        states = run.call("data_state", 4)
    assert states[0] is not None
    assert states[0]["samples"] == 4 * 8 * accumulate
    return losses


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_plan_trains_as_one_process_on_samples_that_run_on_over_epochs(seed: int) -> None:
    def data() -> Any:
        return batches(Digits(21), 8, shuffle=True, drop_last=False)

    torch.testing.assert_close(planned(data(), seed), eager(data(), 4, 8), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loader", [False, True])
def test_accumulated_batches_train_as_batches_twice_as_large(loader: bool) -> None:
    def data(size: int) -> Any:
        if loader:
            return DataLoader(Digits(80), batch_size=size, drop_last=True)
        return batches(Digits(80), size, shuffle=True)

    small, large = planned(data(8), 4, accumulate=2), eager(data(16), 4, 16)
    torch.testing.assert_close(small, large, rtol=1e-12, atol=0)


def feeds(data: Any, **options: Any) -> list[Any]:
    """Two replicas of a stage that reads, and one rank that reads nothing."""
    specs = [
        dataclasses.replace(
            spec, replica=spec.rank % 2, replicas=2, microbatches=2, global_batch=8,
            inputs=("in:1",) if spec.rank < 2 else (), batch_dims=(0, 0),
        )
        for spec in fake_specs(3)
    ]  # fmt: skip
    opened = peek(data, 0)
    make = DataFeed(HeldBatches(opened), BatchForm(opened.example), specs, **options)
    world = LocalWorld(3, timeout_s=5)
    found = [make.for_rank(s.rank)(s, world.group(s.rank)) for s in specs]  # one after the other:
    for feed in found:  # no rank waits for another
        assert isinstance(feed, OwnRows)
        feed.extend(50)
    return found


def test_each_rank_reads_its_own_rows_and_only_those() -> None:
    data = Digits(64)
    found = feeds(batches(data, 8))
    data.read.clear()
    one = found[1].take(0)["in:1"].tolist()
    assert one == [i % 3 for i in (2, 3, 6, 7)]  # replica 1 of microbatches 0 to 3 and 4 to 7
    found[1].close()
    assert {i % 4 // 2 for i in data.read} == {1}
    assert found[2].take(0) == {}
    assert found[2].data_state(1) is None
    for feed in found:
        feed.close()


def test_all_ranks_end_before_the_same_step_also_those_that_read_nothing() -> None:
    found = feeds(batches(Digits(20), 8), epochs=2)
    for step in range(4):
        assert all(feed.take(step) is not None for feed in found)
    assert [feed.take(4) for feed in found] == [None] * 3
    assert [feed.take(4) for feed in found] == [None] * 3, "and stay there"
    for feed in found:
        feed.close()


def test_an_error_is_told_by_the_rank_whose_row_it_is_and_steps_come_in_order() -> None:
    class Broken(Digits):
        def __getitem__(self, index: int) -> Any:
            if index == 26:  # a row of replica 1
                raise ValueError("no such file")
            return super().__getitem__(index)

    found = feeds(batches(Broken(64), 8))
    for step in range(3):
        found[0].take(step), found[1].take(step)
    assert found[0].take(3) is not None
    with pytest.raises(DataError, match=r"dataset\[26\] raised ValueError: no such file"):
        found[1].take(3)
    with pytest.raises(DataError, match="step 7 was asked for, the next one is that of 4"):
        found[0].take(7)
    with pytest.raises(DataError, match="before step 40 is not known"):
        found[0].data_state(40)
    for feed in found:
        feed.close()


def test_prefetch_reads_as_much_as_may_lie_ready_and_no_more() -> None:
    data = Digits(64)
    found = feeds(batches(data, 8), ahead=3)
    data.read.clear()
    found[0].prefetch(5, 90)
    assert len(data.read) == 3 * 4
    assert found[0].take(5) is not None
    found[1].prefetch(5, 7)
    assert found[1].take(5) is not None
    for feed in found:
        feed.close()
    short = feeds(batches(Digits(8), 8), epochs=1, ahead=3)
    short[0].prefetch(0, 90)  # returns, though there is but one batch
    assert short[0].take(0) is not None
    assert short[0].take(1) is None
    for feed in short:
        feed.close()
