"""Samples drawn by index: the order, what an epoch holds, and what is refused."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from raypar.errors import DataError
from raypar.train.data import DataPosition, SampledBatches, batches, peek
from raypar.train.data import _order as order_module
from raypar.train.data._order import EpochOrder
from tests.train.data.sources import Numbered, batch_of


def ids(source: Any, epochs: int) -> list[list[int]]:
    assert isinstance(source, SampledBatches)
    return [batch["y"].tolist() for batch, _ in source.read(epochs=epochs)]


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_an_epochs_order_holds_every_sample_once(
    length: int, seed: int, epoch: int, with_table: bool
) -> None:
    limit, order_module._TABLE = order_module._TABLE, length if with_table else 0
    try:
        found = EpochOrder(length, seed).at(epoch, np.arange(length))
        other = EpochOrder(length, seed).at(epoch + 1, np.arange(length))
    finally:
        order_module._TABLE = limit
    assert sorted(found.tolist()) == list(range(length))
    if length > 50:
        assert found.tolist() != other.tolist()
        assert (found != np.arange(length)).mean() > 0.8


def test_an_order_without_a_table_spreads_samples_evenly() -> None:
    length = order_module._TABLE + 77
    found = EpochOrder(length, 1).at(0, np.arange(20_000))
    assert len(set(found.tolist())) == 20_000
    assert found.max() < length
    counts = np.bincount(found * 16 // length, minlength=16)
    assert (abs(counts - 1250) < 250).all()  # seven standard deviations


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_every_sample_is_read_once_in_each_epoch(
    length: int, size: int, epochs: int, drop_last: bool
) -> None:
    if drop_last and length < size:
        with pytest.raises(DataError, match=rf"{length} samples.*has {size}.*drop_last=False"):
            batches(Numbered(length), size)
        return
    source = batches(Numbered(length), size, shuffle=True, drop_last=drop_last, seed=4)
    assert isinstance(source, SampledBatches)
    found = ids(source, epochs)
    assert len(found) == source.steps_in(epochs)
    assert {len(b) for b in found} == {size}
    flat = [i for b in found for i in b]
    if drop_last:
        per_epoch = length // size * size
        assert all(
            len(set(flat[e * per_epoch : (e + 1) * per_epoch])) == per_epoch for e in range(epochs)
        )
    else:
        counts = Counter(flat[: epochs * length])
        assert set(counts.values()) == {epochs}
        assert len(counts) == length


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40), st.booleans(), st.data())
def test_positions_are_the_same_step_by_step_and_at_once(
    length: int, size: int, steps: int, drop_last: bool, data: st.DataObject
) -> None:
    if drop_last and length < size:
        return
    source = batches(Numbered(length), size, drop_last=drop_last)
    assert isinstance(source, SampledBatches)
    start = DataPosition(7, data.draw(st.integers(0, 2)), data.draw(st.integers(0, length - 1)))
    at = start
    for _ in range(steps):
        at = source.after(1, at)
    if steps:
        assert at == source.after(steps, start)
    assert at.samples == 7 + steps * size
    for epochs in range(4):
        left = source.steps_in(epochs, start)
        assert left == 0 or source.after(left - 1, start).epoch < epochs
        assert source.after(left, start).epoch >= epochs


def test_what_a_sample_draws_depends_on_nothing_but_seed_epoch_and_index() -> None:
    def draws(**options: Any) -> dict[tuple[int, int], float]:
        source = batches(Numbered(10, noise=True), 4, shuffle=True, drop_last=False, **options)
        assert isinstance(source, SampledBatches)
        found = {}
        for number, (batch, _) in enumerate(source.seeded(3).read(epochs=2)):
            for place, i in enumerate(batch["y"].tolist()):
                found[(4 * number + place) // 10, i] = float(batch["x"][place, 0])
        return found

    before = torch.get_rng_state()
    here = draws()
    assert torch.equal(before, torch.get_rng_state())
    assert here == draws(num_workers=2)
    assert here != draws(seed=4)
    assert here[0, 5] != here[1, 5], "every epoch has its own crops"


def test_ranks_read_only_their_own_rows() -> None:
    data = Numbered(16)
    source = batches(data, 8)
    assert isinstance(source, SampledBatches)
    batch, at = next(source.read(places=np.array([1, 5])))
    assert batch["y"].tolist() == [1, 5] == data.read
    assert at == DataPosition(8, 0, 8, source.identity)


class Broken(Numbered):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OSError("shard 3 is gone")
        return super().__getitem__(index)


class Uneven(Numbered):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3 if index == 5 else 2)


class Odd(Numbered):
    def __getitem__(self, index: int) -> Any:
        return object()


class Many(Numbered):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.together = len(indices)
        return [self[i] for i in indices]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(workers: int) -> None:
    source = batches(Broken(8), 4, num_workers=workers)
    with pytest.raises(
        DataError, match=r"^dataset\[5\] raised OSError: shard 3 is gone \(a Broken of 8 samples\)$"
    ):
        ids(source, 1)


@pytest.mark.parametrize(
    ("dataset", "options", "text"),
    [
        (Numbered(0), {}, r"empty: len\(dataset\) is 0"),
        (Numbered(3), {"global_batch": 4}, "has 3 samples, a global batch has 4.*to 3 or less"),
        (Numbered(3), {"global_batch": 0}, "global_batch is 0"),
        (Numbered(3), {"num_workers": -1}, "num_workers is -1"),
        (Uneven(8), {}, r"dataset\[4\] is Tensor\[2\] float32, dataset\[5\] is Tensor\[3\]"),
        (Odd(8), {}, r"raised TypeError.*the first one is object.*collate_fn"),
        (3, {}, "dataset is int"),
        (iter([1]), {"shuffle": True}, "shuffle=True needs samples that can be read by index"),
        (iter([1]), {"drop_last": False}, "drop_last=False needs"),
        (iter([1]), {"num_workers": 2}, "num_workers=2 needs"),
        (batches(Numbered(4), 2), {}, "made by raypar.batches already"),
    ],
)
def test_wrong_data_sets_are_told(dataset: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        list(batches(dataset, **{"global_batch": 2, **options}))


def test_a_data_set_that_reads_many_at_once_is_asked_for_many_at_once() -> None:
    data = Many(8)
    assert ids(batches(data, 4), 1) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.together == 4


def test_a_position_of_other_data_is_refused() -> None:
    source = batches(Numbered(16), 4, shuffle=True, seed=1)
    assert isinstance(source, SampledBatches)
    at = source.after(2)
    with pytest.raises(DataError, match=r"16 samples shuffled by seed 1; this data set has 17 sa"):
        next(batches(Numbered(17), 4, shuffle=True, seed=1).read(at))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="16 samples in their own order"):
        next(batches(Numbered(16), 4, seed=1).read(at))  # type: ignore[attr-defined]


def test_a_collate_function_that_looks_at_the_whole_batch_is_read_by_one_rank() -> None:
    def padded(samples: list[Any]) -> Any:
        return {k: torch.stack([s[k] for s in samples]) - samples[0][k] for k in samples[0]}

    assert peek(batches(Numbered(8), 4), 0).by_rows
    assert not peek(batches(Numbered(8), 4, collate_fn=padded), 0).by_rows
    assert peek(batches(Numbered(8), 1, collate_fn=padded), 0).by_rows


def test_single_samples_passed_as_data_are_refused_with_what_to_write() -> None:
    with pytest.raises(DataError, match=r"holds single samples: pass raypar.batches\("):
        peek(Numbered(8), 0)


def test_sources_travel_without_their_tables() -> None:
    source = batches(Numbered(1000), 4, shuffle=True, seed=1)
    first = ids(source, 1)[0]
    data = pickle.dumps(source)
    assert len(data) < 2000 + 8 * 1000
    assert ids(pickle.loads(data), 1)[0] == first


class FakeHugging:
    """As Hugging Face's Dataset: lists of numbers unless it is given a format."""

    __module__ = "datasets.arrow_dataset"

    def __init__(self, style: str | None = None) -> None:
        self.format = {"type": style}

    def with_format(self, style: str) -> FakeHugging:
        return FakeHugging(style)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        row = {"ids": [index, index + 1, index + 2], "label": index}
        return {k: torch.tensor(v) for k, v in row.items()} if self.format["type"] else row

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def test_hugging_face_rows_come_as_tensors() -> None:
    batch = peek(batches(FakeHugging(), 2), 0).example
    assert batch["ids"].tolist() == [[0, 1, 2], [1, 2, 3]]
    with pytest.raises(DataError, match="FakeHugging, which holds single samples"):
        peek(FakeHugging(), 0)  # type: ignore[arg-type]


class Epochs(IterableDataset[Any]):
    """As a streamed data set of Hugging Face: it is told the epoch, and has a state."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return ({k: v[0] for k, v in batch_of([100 * self.epoch + i]).items()} for i in range(5))


def test_samples_one_by_one_are_grouped_and_told_the_epoch() -> None:
    opened = peek(batches(Epochs(), 2), 0)
    found = [batch["y"].tolist() for batch, _ in opened.read(2, epochs=2)]
    assert found == [[0, 1], [2, 3], [100, 101], [102, 103]]


class BufferShuffledSamples(Epochs):
    """As a streamed data set of Hugging Face after ``shuffle``: its state lacks the buffer."""

    __module__ = "datasets.iterable_dataset"

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("not to be relied on")

    load_state_dict = state_dict  # type: ignore[assignment]


class Mapped(Epochs):
    __module__ = "datasets.iterable_dataset"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = [inner]

    def state_dict(self) -> dict[str, Any]:
        return {}

    load_state_dict = state_dict  # type: ignore[assignment]


def test_a_state_that_leaves_out_a_shuffle_buffer_is_not_used() -> None:
    for source in (BufferShuffledSamples(), Mapped(Mapped(BufferShuffledSamples()))):
        assert not hasattr(batches(source, 2), "state_dict")
    assert hasattr(batches(Mapped(Epochs()), 2), "state_dict")
