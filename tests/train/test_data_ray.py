"""Data on their way to ranks on Ray: read where they are needed, and resumed under other ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from raypar.errors import DataError
from raypar.stages.remote import RayRun
from raypar.stages.spec import RankSpec, StepReport
from raypar.train.data import BatchForm, DataPosition, batches, peek
from raypar.train.data.stream import Mark
from raypar.train.feed import DataFeed
from raypar.train.relay import shipped
from release._idle import IdleRunner
from tests.stages.fakes import fake_specs
from tests.train.data.sources import KINDS, batch_of


class OnOnePlace:
    """Samples that only the process of the test can read."""

    def __init__(self) -> None:
        self.lines: Iterator[int] = iter(range(10_000))  # an open file, say

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (batch_of([i, i + 1, i + 2, i + 3]) for i in range(0, 40, 4))

    def __getstate__(self) -> Any:
        raise TypeError("an open file cannot be pickled")


class Sums(IdleRunner):
    """Its loss is the sum over its inputs, so that a step's loss is the sum over the batch."""

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        return StepReport(step, loss=float(sum(t.double().sum() for t in inputs.values())))


def ranks_of(count: int) -> list[RankSpec]:
    """Replicas of one stage that takes all."""
    return [
        dataclasses.replace(
            spec, group=0, replica=spec.rank, replicas=count, inputs=("in:0", "in:1"),
            batch_dims=(0, 0),
        )
        for spec in fake_specs(count)
    ]  # fmt: skip


def losses(
    data: Any, start: Any, first: int, steps: int, replicas: int, **end: Any
) -> tuple[list[float], Any]:
    """The sum over each step's global batch, and the position at the end."""
    found: list[float] = []
    ranks = ranks_of(replicas)
    with ExitStack() as stack:
        opened = peek(data, 3)
        at = DataPosition.from_json(start)
        source = shipped(data, opened, 3, steps, stack, start=at, **end)
        feed = DataFeed(source, BatchForm(opened.example), ranks, start=at, **end)
        run = stack.enter_context(RayRun(ranks, feed=feed, runner=Sums))
        run.call("prefetch", first, first + steps)
        after = run.train(first, steps, lambda r: found.append(float(r.loss or 0)))
        state = run.call("data_state", after)[0]
    return found, state


def alone(data: Any, steps: int) -> tuple[list[float], Any]:
    """`losses` of the first steps as this process reads them."""
    read = peek(data, 3).read(4)
    got = [next(read) for _ in range(steps)]
    return [float(b["x"].sum() + b["y"].sum()) for b, _ in got], stands(got[-1][1])


def stands(at: Mark | DataPosition) -> dict[str, Any]:
    """A position as a checkpoint holds it."""
    return (at.position() if isinstance(at, Mark) else at).to_json()


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("relayed", 0),
        pytest.param("relayed", 1, marks=pytest.mark.thorough),
        pytest.param("map", 2, marks=pytest.mark.thorough),
    ],
)
def test_a_run_goes_on_on_other_ranks_where_it_was_stopped(
    ray_session: str, kind: str, before: int
) -> None:
    """The first steps are those of `before` ranks, or of this process."""

    def made() -> Any:
        return OnOnePlace() if kind == "relayed" else KINDS[kind](40, 4)

    part, at = losses(made(), {}, 0, 3, before) if before else alone(made(), 3)
    assert at["samples"] == 12
    rest, end = losses(made(), at, 3, 50, 1, epochs=1)
    assert end["samples"] == 40
    stream = peek(made(), 3).read(4, epochs=1)
    sums = [float(b["x"].sum() + b["y"].sum()) for b, _ in stream]
    np.testing.assert_allclose(part + rest, sums, rtol=1e-6)


def test_ray_data_are_read_by_rows_or_streamed(ray_session: str) -> None:
    pytest.importorskip("pyarrow")
    ray_data = pytest.importorskip("ray.data")
    ray_data.DataContext.get_current().enable_progress_bars = False

    def rows() -> Any:
        numbers = ray_data.range(30, override_num_blocks=4)
        return numbers.map_batches(lambda b: {"x": np.stack([b["id"]] * 2, 1), "y": b["id"]})

    by_rows = peek(batches(rows(), 4, shuffle=True, drop_last=False), 3)
    assert by_rows.by_rows
    read = by_rows.read(4)
    straight = [next(read) for _ in range(9)]
    ids = [batch["y"].tolist() for batch, _ in straight]
    assert len({i for batch in ids[:7] for i in batch}) == 28
    assert ids[:7] != sorted(ids[:7])
    position = straight[2][1]
    assert isinstance(position, DataPosition)
    again = peek(batches(rows(), 4, shuffle=True, drop_last=False), 3).read(4, position)
    assert [next(again)[0]["y"].tolist() for _ in range(6)] == ids[3:]

    streamed = peek(batches(rows(), 4), 3)
    assert not streamed.by_rows
    stream = streamed.read(4)
    sums, ats = zip(*[(3 * float(b["y"].sum()), at) for b, at in islice(stream, 9)], strict=True)
    rest, end = losses(batches(rows(), 4), stands(ats[2]), 3, 6, 2)  # on ranks from there on
    np.testing.assert_allclose(rest, sums[3:])
    assert end == stands(ats[8])
    with pytest.raises(DataError, match="column 'name' of the Ray Dataset holds"):
        peek(batches(ray_data.from_items([{"name": "a"}] * 8), 4), 0)
    with pytest.raises(DataError, match=r"Dataset, which holds single samples: pass raypar.batch"):
        peek(rows(), 0)
    with pytest.raises(DataError, match="is a stream of rows: with shuffle=True"):
        batches(rows().streaming_split(1)[0], 4, shuffle=True)
    with pytest.raises(DataError, match="num_workers=2: Ray Data reads in tasks"):
        batches(rows(), 4, num_workers=2)
