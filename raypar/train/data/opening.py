"""What may be passed as data, and one look at it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec
from raypar.train.data.batches import needs_batches
from raypar.train.data.form import BatchForm, plain
from raypar.train.data.join import joined, rows_of
from raypar.train.data.position import DataPosition
from raypar.train.data.randomness import RandomState
from raypar.train.data.samples import SampledBatches
from raypar.train.data.stream import Mark, Passes, called, grouped, keywords_of, length_of, raised
from raypar.train.data.stream import read as read_passes

Data = Iterable[Any] | Callable[..., Iterable[Any]]
"""Batches: an iterable (a list, a `torch.utils.data.DataLoader`, what `raypar.batches` makes, ...),
an iterator, or a callable that returns one of them.

A callable may take ``epoch``, the number of the pass, or ``start_sample``, how many samples of that
pass to leave out: it is then called anew for every epoch, and a resume need not read over what was
consumed."""

_FRESH = DataPosition()


@dataclass(frozen=True)
class Opened:
    """A user's data after one look at it.

    Attributes:
        example: The first batch.
        batches: All batches, the first among them (before they are joined by `accumulate`).
        one_shot: Whether `batches` can be gone through only once.
        random: Random states to set before `batches` is gone through.
        data: What the user passed.
        accumulate: Batches in a row that make one global batch.
        batch_dims: As for `raypar.capture`.
        by_rows: Whether each rank may read its own rows itself.
    """

    example: Any
    batches: Iterable[Any]
    one_shot: bool
    random: RandomState
    data: Any = None
    accumulate: int = 1
    batch_dims: Any = None
    by_rows: bool = False

    @property
    def sampled(self) -> SampledBatches | None:
        """The batches, where raypar draws them itself: global ones, joined already."""
        found = self.batches
        return found.times(self.accumulate) if isinstance(found, SampledBatches) else None

    def read(
        self, size: int, start: DataPosition = _FRESH, epochs: int | None = None
    ) -> Generator[tuple[Any, Mark | DataPosition], None, None]:
        """Global batches of `size` samples from `start` on, each with the position after it.

        Args:
            size: Samples of a global batch.
            start: Where to begin.
            epochs: End, without an error, after so many passes.

        Raises:
            DataError: The source raised or ended, or `start` is no position in it.
        """
        sampled = self.sampled
        if sampled is not None:
            yield from sampled.read(start, epochs=epochs)
            return
        if start.random is None:
            self.random.set()
        call = self.data if callable(self.data) and keywords_of(self.data) else None
        made = self.data if self.one_shot and isinstance(self.data, Iterator) else self.batches
        loader = made if hasattr(made, "state_dict") and hasattr(made, "load_state_dict") else None
        passes = Passes(
            self.batches, call=call, loader=loader, one_shot=self.one_shot and call is None
        )
        marked = read_passes(passes, size=size // self.accumulate, start=start, epochs=epochs)
        yield from grouped(marked, self.accumulate, self.batch_dims)

    def steps_in(self, epochs: int, start: DataPosition = _FRESH) -> int | None:
        """Steps from `start` to the end of so many epochs; None where only reading on tells."""
        sampled = self.sampled
        if sampled is not None:
            return sampled.steps_in(epochs, start)
        if self.one_shot or (callable(self.data) and keywords_of(self.data)):
            return None
        length = length_of(self.batches)
        if length is None:
            return None
        size = BatchSpec.of(self.example, self.batch_dims).size // self.accumulate
        left = (epochs - start.epoch) * length - start.index // size
        return max(0, left // self.accumulate)


def open_data(data: Data, seed: int = 0) -> Iterable[Any]:
    """The iterable behind what a user passed.

    Args:
        data: It.
        seed: Seed of the orders that raypar draws, where the data name none.

    Raises:
        DataError: It is none, or the callable raised.
    """
    made: Any = data
    if callable(data) and not isinstance(data, Iterable):
        try:
            made = called(data, 0, 0)
        except Exception as error:
            raise DataError(
                f"data() raised {type(error).__name__}: {error}; it is called without arguments "
                "(or with epoch= and start_sample=, if it takes them) and must return an iterable "
                "of batches"
            ) from error
    what = "data() returned" if made is not data else "data is"
    if needs_batches(made):
        raise DataError(
            f"{what} {type(made).__name__}, which holds single samples: pass "
            "raypar.batches(dataset, global_batch=32, shuffle=True), which makes batches of them"
        )
    if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
        raise DataError(
            f"{what} {type(made).__name__}; pass an iterable of global batches, a DataLoader, or a "
            "callable that returns one"
        )
    if isinstance(made, (torch.Tensor, np.ndarray, str, bytes, dict)):
        raise DataError(
            f"data is one {type(made).__name__}; pass an iterable of global batches, for example "
            "[batch] to train on one batch again and again"
        )
    return made.seeded(seed) if isinstance(made, SampledBatches) else made  # type: ignore[no-any-return]


def peek(data: Data, seed: int, *, accumulate: int = 1, batch_dims: Any = None) -> Opened:
    """Opens `data` and reads its first batch, with the random states of `seed`.

    Args:
        data: What the user passed.
        seed: Seed of what the loader draws.
        accumulate: Batches in a row that make one global batch, and so the example.
        batch_dims: As for `raypar.capture`; used to join batches.

    Raises:
        DataError: It is no data, is empty, or raised.
    """
    before = RandomState.now()
    start = RandomState.of_seed(seed)
    start.set()
    try:
        made = open_data(data, seed)
        if isinstance(made, SampledBatches):
            example = made.times(accumulate).first()
            by_rows = _works_by_rows(made.times(accumulate), example, batch_dims)
            return Opened(example, made, False, start, data, accumulate, batch_dims, by_rows)
        head = getattr(made, "head", None)  # of a stream that is costly to begin and leave
        iterator = iter(made) if head is None else head(accumulate)
        first = _first(iterator, accumulate)
        example = plain(first[0]) if accumulate == 1 else joined(first, batch_dims)
        if iterator is made:
            rest = itertools.chain(first, iterator)
            now = RandomState.now()
            return Opened(example, rest, True, now, data, accumulate, batch_dims)
        return Opened(example, made, False, start, data, accumulate, batch_dims)
    finally:
        before.set()


def _first(iterator: Iterator[Any], count: int) -> list[Any]:
    found: list[Any] = []
    try:
        for _ in range(count):
            found.append(next(iterator))
    except StopIteration:
        if not found:
            raise DataError("the data source is empty: it holds no batch") from None
        raise DataError(
            f"the data source ended after {len(found)} batches, accumulate={count} needs {count} "
            f"for one step: set accumulate={len(found)} or less, or pass more data"
        ) from None
    except DataError:
        raise
    except Exception as error:
        raise raised(error, 0) from error
    return found


def _works_by_rows(source: SampledBatches, example: Any, batch_dims: Any) -> bool:
    """Whether a batch of some of the samples is those rows of the batch of all.

    It is for what stacks samples; not for a collate function that pads to the longest sample, or
    that draws masks: what that gives is read whole by one rank.
    """
    form = BatchForm(example, batch_dims)
    size = source.global_batch
    half = size // 2
    if not half:
        return True
    try:
        found = source.first(np.arange(half, size))
        parts = form.tensors(found, 0, size - half)
    except Exception:  # whatever it is that it cannot do with fewer samples
        return False
    wanted = rows_of(example, form.spec, half, size - half)
    return all(torch.equal(a, b) or _both_nan(a, b) for a, b in zip(parts, wanted, strict=True))


def _both_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())
