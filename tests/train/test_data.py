"""What may be passed as data, how it repeats, and what is checked of each batch."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import tempfile
import warnings
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raypar as rp
from raypar.errors import CaptureError, DataError
from raypar.train.data import BatchForm, all_epochs, open_data, peek


def numbers(n: int) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(n)]


def values(batches: Any, n: int) -> list[float]:
    return [float(b[0, 0]) for b in itertools.islice(all_epochs(batches), n)]


def test_what_can_be_iterated_again_is_repeated() -> None:
    assert values(numbers(3), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert values(peek(lambda: numbers(2), 0).batches, 5) == [0, 1, 0, 1, 0]


def test_a_one_shot_iterator_that_ends_says_after_how_many() -> None:
    source = all_epochs(iter(numbers(3)))
    for _ in range(3):
        next(source)
    with pytest.raises(DataError, match=r"ended after 3 batches: step 3 .* steps=3"):
        next(source)


def test_an_iterable_that_is_empty_the_second_time_ends_too() -> None:
    class Once:
        def __init__(self) -> None:
            self.used = False

        def __iter__(self) -> Iterator[torch.Tensor]:
            found = [] if self.used else numbers(2)
            self.used = True
            return iter(found)

    source = all_epochs(Once())
    next(source), next(source)
    with pytest.raises(DataError, match="ended after 2 batches"):
        next(source)


def test_peeking_loses_no_batch_of_an_iterator() -> None:
    opened = peek(iter(numbers(3)), 0)
    assert opened.one_shot
    assert float(opened.example[0, 0]) == 0
    assert [float(b[0, 0]) for b in opened.batches] == [0, 1, 2]


def test_an_error_of_the_users_iterable_is_told_with_its_text() -> None:
    def bad() -> Iterator[torch.Tensor]:
        yield from numbers(2)
        raise OSError("disk on fire")

    source = all_epochs(bad())
    next(source), next(source)
    with pytest.raises(
        DataError, match=r"raised OSError after 2 batches.*step 2: disk on fire"
    ) as e:
        next(source)
    assert isinstance(e.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "empty"),
        (3, "data is int"),
        (torch.ones(3), r"one Tensor; .*\[batch\]"),
        (np.ones(3), "one ndarray"),
        ([np.array(["a", "b"])], r"dtype <U1 and shape \(2,\).*numbers of their tokens"),
        ({"x": 1}, "one dict"),
        (lambda: None, r"data\(\) returned NoneType"),
        (lambda: 1 / 0, r"data\(\) raised ZeroDivisionError"),
    ],
)
def test_what_is_no_data_is_refused(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        peek(data, 0)


def test_the_seed_gives_the_loaders_order_and_peeking_leaves_the_random_state() -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(16)), batch_size=4, shuffle=True)

    def order(seed: int) -> list[float]:
        opened = peek(loader, seed)
        state = torch.get_rng_state()
        opened.random.set()
        found = [b[0].tolist() for b in itertools.islice(all_epochs(opened.batches), 8)]
        torch.set_rng_state(state)
        return found

    before = torch.get_rng_state()
    assert order(1) == order(1)
    assert order(1) != order(2)
    first = order(1)
    assert first[:4] != first[4:], "every epoch has its own order"
    assert torch.equal(before, torch.get_rng_state())
    assert peek(loader, 1).example[0].tolist() == first[0]


def test_random_batches_of_an_iterator_do_not_repeat() -> None:
    def draw() -> Iterator[torch.Tensor]:
        while True:
            yield torch.rand(2, 3)

    opened = peek(draw(), 5)
    opened.random.set()
    a, b, c = itertools.islice(opened.batches, 3)
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


def form() -> BatchForm:
    return BatchForm(
        {"ids": torch.zeros(4, 3, dtype=torch.int64), "flag": True, "w": torch.ones(4)}
    )


def batch(**change: Any) -> dict[str, Any]:
    return {"ids": torch.ones(4, 3, dtype=torch.int64), "flag": True, "w": torch.ones(4), **change}


def test_a_batch_of_the_same_form_passes() -> None:
    found = form().tensors(batch(), 3)
    assert [tuple(t.shape) for t in found] == [(4, 3), (4,)]
    assert len(form().tensors(UserDict(batch()), 3)) == 2  # as Hugging Face's BatchEncoding


def test_arrays_are_taken_as_the_tensors_that_a_loader_makes_of_them() -> None:
    ids = np.arange(12).reshape(4, 3)
    frozen = np.ones(8, dtype=np.float32)[::-2]  # backwards, and not to be written to
    frozen.flags.writeable = False
    given = {"ids": ids, "flag": True, "w": frozen}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = form().tensors(given, 0)
        opened = peek([given], 0)
    assert [t.dtype for t in found] == [torch.int64, torch.float32]
    assert torch.equal(found[0], torch.arange(12).reshape(4, 3))
    assert isinstance(opened.example["ids"], torch.Tensor)
    swapped = form().tensors({**given, "ids": ids.astype(">i8")}, 0)
    assert torch.equal(swapped[0], found[0])


def test_a_list_of_arguments_may_follow_a_tuple_of_them() -> None:
    pair = (torch.zeros(4, 3), torch.zeros(4))
    for first, then in ((pair, list(pair)), (list(pair), pair)):
        assert len(BatchForm(first).tensors(then, 1)) == 2
    with pytest.raises(DataError, match="another structure"):
        BatchForm(pair).tensors([*pair, pair[0]], 1)


class _Fatal:
    """Samples of which one kills whoever reads it."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, at: int) -> torch.Tensor:
        if at == 20 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([float(at)])


@pytest.mark.parametrize("drawn_here", [True, False])
def test_a_reading_process_that_is_killed_is_told_with_the_way_out(drawn_here: bool) -> None:
    data: Any = (
        rp.batches(_Fatal(), 4, num_workers=1)
        if drawn_here
        else DataLoader(_Fatal(), batch_size=4, num_workers=1)  # type: ignore[arg-type]
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(DataError, match=r'step \d\b.*num_workers .* lower.*resume_from="auto"'),
    ):
        rp.Trainer(
            lambda: nn.Linear(1, 1),
            loss_fn=lambda output: output.square().mean(),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
            data=data,
            steps=10,
            scaling_config=rp.ScalingConfig(num_workers=0),
            search_config=rp.SearchConfig(stages=1),
            run_config=rp.RunConfig(name="run", storage_path=folder, log_every=0),
        ).fit()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"ids": torch.ones(3, 3, dtype=torch.int64)},
            r"batch\['ids'\] of step 3 has shape \(3, 3\), expected \(4, 3\).*3 samples instead of "
            r"4.*drop_last=True",
        ),
        ({"ids": torch.ones(4, 5, dtype=torch.int64)}, r"shape \(4, 5\), expected \(4, 3\)"),
        ({"ids": torch.ones(4, 3)}, r"\['ids'\].*dtype torch.float32, expected torch.int64"),
        ({"w": 1.0}, r"batch\['w'\] of step 3 is float"),
        ({"flag": False}, r"batch\['flag'\] of step 3 is False, in the first batch it was True"),
        ({"extra": torch.ones(4)}, "another structure"),
    ],
)
def test_another_form_is_refused_with_the_leafs_name(change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        form().tensors(batch(**change), 3)


def test_a_callable_class_that_is_iterable_is_an_iterable() -> None:
    class Both:
        def __iter__(self) -> Iterator[int]:
            return iter([1])

        def __call__(self) -> list[int]:
            raise AssertionError("not to be called")

    assert list(open_data(Both())) == [1]


def test_a_form_travels_without_changing() -> None:
    there = pickle.loads(pickle.dumps(form()))
    assert there.spec == form().spec
    assert there.names == form().names
    assert len(there.tensors(batch(), 3)) == 2


def test_a_batch_without_samples_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"holds no sample: shapes \[\(0, 3\)\]"):
        BatchForm(torch.zeros(0, 3))
