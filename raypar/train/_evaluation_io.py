"""Batches on their way to ranks that evaluate, and results on their way back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from raypar.errors import DataError
from raypar.graph.states import Batch, Const, State
from raypar.stages.evaluation import Parcel
from raypar.stages.local import LocalRun
from raypar.stages.run import Run
from raypar.train.data.form import plain
from raypar.train.data.randomness import RandomState, reading_samples
from raypar.train.data.workers import advice

Batches = Iterable[Any] | Callable[[], Iterable[Any]]

_END = object()


def read_batches(batches: Batches, seed: int) -> Generator[Any]:
    """The batches of a data source; what its own code raises is told as such.

    Global random states are those of `seed` while it is read, so that every evaluation reads the
    same, and what training draws does not depend on it.

    Raises:
        DataError: It is none, or raised.
    """
    count = 0
    try:
        with reading_samples():
            RandomState.of_seed(seed).set()
            opened = batches if isinstance(batches, Iterable) else batches()
            iterator = iter(opened)
            random = RandomState.now()
        while True:
            with reading_samples():
                random.set()
                batch: Any = next(iterator, _END)
                random = RandomState.now()
            if batch is _END:
                return
            yield plain(batch)
            count += 1
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(
            f"reading the evaluation data failed with {type(error).__name__} after {count} "
            f"batches: {error}"
            + (advice(error) or "; pass an iterable of batches, or a callable that returns one")
        ) from error


EMPTY = (
    "the evaluation data are empty: they hold no batch; pass an iterable of batches that can be "
    "gone through again at every evaluation (a list, a DataLoader, a callable that returns one)"
)


def check_not_empty(batches: Batches, seed: int) -> None:
    """Looks whether there is a first batch, where looking does not use it up.

    What knows its length is not read.

    Raises:
        DataError: There is none, or reading it failed.
    """
    if isinstance(batches, Iterator):
        return
    try:
        empty = not len(batches)  # type: ignore[arg-type]
    except TypeError:  # of a callable, or of a stream
        reading = read_batches(batches, seed)
        with closing(reading):
            empty = next(reading, _END) is _END
    if empty:
        raise DataError(EMPTY)


@dataclass(frozen=True)
class _Held:
    """Rows that are in this process already."""

    rows: dict[str, torch.Tensor]

    def open(self) -> Mapping[str, torch.Tensor]:
        return self.rows


@dataclass(frozen=True)
class _Stored:
    """Rows in Ray's object store: a rank fetches its own, once a node."""

    reference: Any

    def open(self) -> Mapping[str, torch.Tensor]:
        import ray

        found: dict[str, torch.Tensor] = ray.get(self.reference)
        return found


def parcel(run: Run, rows: dict[str, torch.Tensor]) -> Parcel:
    """Rows on their way to a rank of `run`."""
    if isinstance(run, LocalRun):
        return _Held(rows)
    import ray

    return _Stored(ray.put({name: t.contiguous() for name, t in rows.items()}))


def whole_of(parts: Sequence[torch.Tensor], state: State) -> torch.Tensor:
    """A result of the whole batch; see `raypar.graph.states`."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(state, Batch):
        dim, outer = state.dim, state.outer
        cut = [p.unflatten(dim, (outer, -1)) for p in parts]
        value = torch.cat(cut, dim + 1).flatten(dim, dim + 1)
    elif isinstance(state, Const):
        value = parts[0]
    else:
        value = torch.stack(list(parts)).sum(0)
    power = getattr(state, "power", 0)
    return (value * float(len(parts)) ** power).to(value.dtype) if power else value
