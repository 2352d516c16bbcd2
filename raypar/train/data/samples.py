"""Global batches that raypar draws from a map-style data set itself.

Which samples make the batch of a step is arithmetic: a function of the seed, the number of samples
and the position. So every rank can work out its own rows, and read them itself; a position is three
numbers, whatever the plan; and a resume begins at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from raypar.errors import DataError
from raypar.train.data._order import EpochOrder, Indices
from raypar.train.data.position import DataPosition
from raypar.train.data.randomness import reading_samples
from raypar.train.data.rows import Rows

_FRESH = DataPosition()


@dataclass(frozen=True)
class SampledBatches:
    """Global batches over samples that can be read by index; made by `raypar.batches`.

    Iterating over it gives the batches of the first epoch; `len` tells how many those are.

    Attributes:
        rows: The samples.
        global_batch: Samples of one batch.
        shuffle: Whether every epoch has an order of its own, else the samples' own.
        drop_last: Whether the samples at the end of an epoch that fill no batch are left out; else
            the batch is filled with the first samples of the next epoch, and that goes on behind
            them: in every epoch each sample is read exactly once.
        seed: Of the orders; None until the trainer gives its own.
        num_workers: Processes that read samples, for each rank that reads; 0 reads in a thread.

    Raises:
        DataError: There are no samples, or too few.
    """

    rows: Rows
    global_batch: int
    shuffle: bool = False
    drop_last: bool = True
    seed: int | None = None
    num_workers: int = 0
    _order: EpochOrder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("global_batch", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DataError(f"{name} is {value!r}; give a whole number of at least {least}")
        length = len(self.rows)
        if length == 0:
            raise DataError("the data set is empty: len(dataset) is 0")
        if self.drop_last and length < self.global_batch:
            raise DataError(
                f"the data set has {length} samples, a global batch has {self.global_batch}: with "
                f"drop_last=True an epoch holds no batch. Set global_batch to {length} or less, or "
                "drop_last=False, whose batches run on into the next epoch"
            )
        seed = (self.seed or 0) if self.shuffle else None
        object.__setattr__(self, "_order", EpochOrder(length, seed))

    def seeded(self, seed: int) -> SampledBatches:
        """The same with `seed`, where none was given."""
        return self if self.seed is not None else dataclasses.replace(self, seed=seed)

    def times(self, count: int) -> SampledBatches:
        """The same with `count` batches in a row as one."""
        return (
            self
            if count == 1
            else dataclasses.replace(self, global_batch=count * self.global_batch)
        )

    # ---- where a step lies ----------------------------------------------------------------

    def steps_in(self, epochs: int, start: DataPosition = _FRESH) -> int:
        """Batches from `start` to the end of so many epochs, counted from the first."""
        left = epochs - start.epoch
        length, size = len(self.rows), self.global_batch
        if left <= 0:
            return 0
        if not self.drop_last:  # the last batch of all is filled up with the next epoch's first
            return -((start.index - left * length) // size)
        return (length - start.index) // size + (left - 1) * (length // size)

    def after(self, steps: int, start: DataPosition = _FRESH) -> DataPosition:
        """The position so many batches behind `start`."""
        length, size = len(self.rows), self.global_batch
        if self.drop_last:
            first, per_epoch = (length - start.index) // size, length // size
            if steps < first:
                epoch, index = start.epoch, start.index + steps * size
            else:
                epochs, batches = divmod(steps - first, per_epoch)
                epoch, index = start.epoch + 1 + epochs, batches * size
        else:
            epochs, index = divmod(start.index + steps * size, length)
            epoch = start.epoch + epochs
        return DataPosition(start.samples + steps * size, epoch, index, self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What positions are positions in: two that differ in it mean different samples."""
        seed = (self.seed or 0) if self.shuffle else None
        return {"length": len(self.rows), "seed": seed}

    def check(self, start: DataPosition) -> None:
        """Refuses a position of another data set.

        Raises:
            DataError: Samples would be repeated or left out.
        """
        if start.source is not None and start.source != self.identity:
            raise DataError(
                f"the saved position is in {_words(start.source)}; this data set has "
                f"{_words(self.identity)}: a resume would repeat some samples and leave out "
                "others. Resume with the same data set, seed and shuffle, or begin a new run from "
                "the model (init_from)"
            )
        if start.index >= len(self.rows):
            raise DataError(
                f"the saved position is sample {start.index} of an epoch, the data set has "
                f"{len(self.rows)} samples: resume with the data set of the run"
            )

    def samples_of(self, at: DataPosition, places: Indices) -> tuple[Indices, Indices]:
        """Epoch and index of the samples at `places` of the batch that begins at a position."""
        epochs, inside = np.divmod(at.index + places, len(self.rows))
        epochs += at.epoch
        indices = np.empty_like(inside)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order.at(int(epoch), inside[here])
        return epochs, indices

    # ---- reading --------------------------------------------------------------------------

    def read(
        self,
        start: DataPosition = _FRESH,
        *,
        epochs: int | None = None,
        places: Indices | None = None,
    ) -> Generator[tuple[Any, DataPosition], None, None]:
        """Batches from `start` on, or the same part of every batch, with the position after each.

        Args:
            start: Where to begin.
            epochs: End after so many, counted from the first of all; None goes on for ever.
            places: Which samples of each batch to read, by their place in it; None for all.

        Raises:
            DataError: A sample cannot be read, or `start` is no position in these samples.
        """
        self.check(start)
        wanted = np.arange(self.global_batch) if places is None else places
        end = None if epochs is None else self.steps_in(epochs, start)
        found = self._read_here if self.num_workers == 0 else self._read_elsewhere
        for step, batch in enumerate(found(start, wanted, end)):
            yield batch, self.after(step + 1, start)

    def first(self, places: Indices | None = None) -> Any:
        """The first batch of all, or a part of it, read in this thread."""
        wanted = np.arange(self.global_batch) if places is None else places
        return next(self._read_here(_FRESH, wanted, 1))

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.read(epochs=1))

    def __len__(self) -> int:
        return self.steps_in(1)

    def _keys(
        self, start: DataPosition, places: Indices, end: int | None
    ) -> Iterator[tuple[Indices, Indices]]:
        step = 0
        while end is None or step < end:
            yield self.samples_of(self.after(step, start), places)
            step += 1

    def _read_here(self, start: DataPosition, places: Indices, end: int | None) -> Iterator[Any]:
        for epochs, indices in self._keys(start, places, end):
            with reading_samples():
                batch = self.rows.read(self.seed or 0, epochs, indices)
            yield batch

    def _read_elsewhere(
        self, start: DataPosition, places: Indices, end: int | None
    ) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _InWorker(self.rows, self.seed or 0),  # type: ignore[arg-type]
            batch_sampler=_Listed(self, start, places, end),
            num_workers=self.num_workers,
            collate_fn=_only,
            generator=torch.Generator(),  # else it draws from the global one
        )
        for found in loader:
            if isinstance(found, _Failed):
                raise DataError(found.text)
            yield found


class _Listed:
    """What to read, as torch's loader asks for it: one key makes one batch."""

    def __init__(
        self, source: SampledBatches, start: DataPosition, places: Indices, end: int | None
    ) -> None:
        self._arguments = (start, places, end)
        self._source = source

    def __iter__(self) -> Iterator[list[tuple[Indices, Indices]]]:
        return ([key] for key in self._source._keys(*self._arguments))


@dataclass(frozen=True)
class _Failed:
    """An error in a worker process; raised there, its text would be buried in two traces."""

    text: str


class _InWorker:
    def __init__(self, rows: Rows, seed: int) -> None:
        self._rows = rows
        self._seed = seed

    def __getitem__(self, key: tuple[Indices, Indices]) -> Any:
        try:
            return self._rows.read(self._seed, *key)
        except DataError as error:
            return _Failed(str(error))


def _only(batches: list[Any]) -> Any:
    return batches[0]


def _words(identity: Any) -> str:
    if not isinstance(identity, dict) or not {"length", "seed"} <= set(identity):
        return "another kind of source"
    order = (
        "in their own order" if identity["seed"] is None else f"shuffled by seed {identity['seed']}"
    )
    return f"{identity['length']} samples {order}"
