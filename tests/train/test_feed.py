"""Batches reach every rank, cut to what it needs, and the end of the data reaches all at once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from raypar.comm.local import LocalWorld
from raypar.errors import CommAbortedError, DataError
from raypar.stages.batch import shard_batch
from raypar.stages.spec import RankSpec
from raypar.stages.worker import Feed
from raypar.train.data import BatchForm, peek
from raypar.train.feed import AHEAD, DataFeed, HeldBatches
from tests.stages.fakes import fake_specs

EXAMPLE = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(5))


def specs() -> list[RankSpec]:
    """Two replicas of two stages, M = 2; the third tensor is broadcast."""
    needs = {0: ("in:0",), 1: ("in:1", "in:2")}
    return [
        dataclasses.replace(
            fake_specs(4)[2 * group + replica],
            group=group,
            replica=replica,
            replicas=2,
            microbatches=2,
            inputs=needs[group],
            batch_dims=(0, 0, None),
        )
        for group in range(2)
        for replica in range(2)
    ]


def batches(n: int) -> list[tuple[torch.Tensor, ...]]:
    return [
        (
            torch.arange(12.0).reshape(4, 3) + 100 * i,
            torch.arange(4) + 100 * i,
            torch.full((5,), float(i)),
        )
        for i in range(n)
    ]


class Table:
    """Feeds of all ranks over one in-process world."""

    def __init__(self, source: Any) -> None:
        self.specs = specs()
        self.world = LocalWorld(4, timeout_s=20)
        make = DataFeed(HeldBatches(peek(source, 0)), BatchForm(EXAMPLE), self.specs)
        self.pool = ThreadPoolExecutor(4)
        self.feeds: list[Feed] = list(
            self.pool.map(lambda s: make.for_rank(s.rank)(s, self.world.group(s.rank)), self.specs)
        )

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        for feed in self.feeds:
            feed.close()
        self.pool.shutdown()

    def extend(self, until: int) -> None:
        for feed in self.feeds:
            feed.extend(until)

    def take(self, step: int) -> list[Any]:
        def one(feed: Feed) -> Any:
            try:
                return feed.take(step)
            except Exception as error:
                return error

        return list(self.pool.map(one, self.feeds))


def test_every_rank_gets_its_own_rows_of_its_own_inputs() -> None:
    data = batches(3)
    with Table(data) as table:
        table.extend(3)
        for step in range(3):
            for spec, found in zip(table.specs, table.take(step), strict=True):
                expected = shard_batch(spec, data[step])
                assert found.keys() == expected.keys() == set(spec.inputs)
                for name, tensor in expected.items():
                    assert torch.equal(found[name], tensor)
    # Replica 1 of microbatches {0, 1} and {2, 3} sees samples 1 and 3.
    assert shard_batch(specs()[1], data[0])["in:0"][:, 0].tolist() == [3.0, 9.0]


def test_a_loader_may_fill_one_buffer_again_and_again() -> None:
    def source() -> Iterator[Any]:
        buffer = tuple(t.clone() for t in EXAMPLE)
        for batch in batches(5):
            for into, tensor in zip(buffer, batch, strict=True):
                into.copy_(tensor)
            yield buffer

    with Table(source) as table:
        table.extend(5)
        for step in range(5):
            assert [float(f["in:2"][0]) for f in table.take(step)[2:]] == [step, step]


def test_nothing_is_read_beyond_what_was_asked_for() -> None:
    read: list[int] = []

    def source() -> Iterator[Any]:
        for i, batch in enumerate(batches(50)):
            read.append(i)
            yield batch

    with Table(source()) as table:
        table.extend(4)
        for step in range(4):
            table.take(step)
            assert len(read) <= step + 1 + AHEAD
        assert read == list(range(4))
        table.extend(5)
        table.take(4)
        assert read == list(range(5))


def test_an_error_arrives_at_its_own_step_and_ends_every_rank_there() -> None:
    def source() -> Iterator[Any]:
        yield from batches(2)
        raise KeyError("sample 17")

    with Table(source()) as table:
        table.extend(9)
        assert all(isinstance(f, dict) for step in range(2) for f in table.take(step))
        first, *others = table.take(2)
        assert isinstance(first, DataError)
        assert "sample 17" in str(first)
        assert "step 2" in str(first)
        assert others == [None, None, None]


def test_a_batch_of_another_form_is_refused_at_its_step() -> None:
    bad = batches(2)
    bad[1] = (bad[1][0][:3], *bad[1][1:])
    with Table(bad) as table:
        table.extend(2)
        table.take(0)
        first, *others = table.take(1)
        assert isinstance(first, DataError)
        assert "drop_last=True" in str(first)
        assert others == [None, None, None]


def test_a_rank_that_waits_for_a_slow_source_can_be_aborted() -> None:
    gate = threading.Event()

    def source() -> Iterator[Any]:
        yield from batches(1)
        gate.wait(20)

    with Table(source()) as table:
        table.extend(3)
        table.take(0)
        waiting = table.pool.submit(table.feeds[0].take, 1)
        table.feeds[0].abort("the user left")
        with pytest.raises(CommAbortedError, match="the user left"):
            waiting.result(timeout=10)
        gate.set()
