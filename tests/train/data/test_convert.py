"""Converted data keep what they could do before."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

from raypar.errors import DataError
from raypar.train.data import DataPosition, RandomState, converted, peek
from tests.train.data.sources import KINDS, Batch


def halved(batch: Batch) -> Batch:
    return {"x": batch["x"].float(), "y": batch["y"]}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_converted_and_all_else_stays(kind: str) -> None:
    def read(change: bool, at: DataPosition, n: int) -> tuple[list[Batch], DataPosition]:
        data: Any = KINDS[kind](10, 4)
        opened = peek(converted(data, halved) if change else data, 3)
        found = list(itertools.islice(opened.read(4, at), n))
        last = found[-1][1]
        assert opened.steps_in(2) == peek(KINDS[kind](10, 4), 3).steps_in(2)
        return [b for b, _ in found], last if isinstance(last, DataPosition) else last.position()

    before = RandomState.now()
    plain, at = read(False, DataPosition(), 3)
    changed, same = read(True, DataPosition(), 3)
    assert (same.samples, same.epoch, same.index, same.source) == (
        at.samples, at.epoch, at.index, at.source,
    )  # fmt: skip
    assert peek(converted(KINDS[kind](10, 4), halved), 3).by_rows == kind.startswith("map")
    after, _ = read(False, at, 2)
    again, _ = read(True, at, 2)
    before.set()
    for a, b in zip(plain + after, changed + again, strict=True):
        assert b["x"].dtype == torch.float32
        assert torch.equal(a["x"].float(), b["x"])
        assert torch.equal(a["y"], b["y"])


def test_a_converted_source_travels_and_what_is_no_data_is_told_as_ever() -> None:
    source = pickle.loads(pickle.dumps(converted(KINDS["stateful"](12, 4), halved)))
    assert peek(source, 0).example["x"].dtype == torch.float32
    with pytest.raises(DataError, match="empty"):
        peek(converted([], halved), 0)
