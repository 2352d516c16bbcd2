"""Batches on their way to ranks that evaluate, and results on their way back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec
from raypar.graph.states import Batch, Const, State
from raypar.stages.evaluation import Parcel
from raypar.stages.local import LocalRun
from raypar.stages.run import Run
from raypar.train.data.form import plain
from raypar.train.data.randomness import RandomState, reading_samples
from raypar.train.data.stream import length_of
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


AGAIN = (
    "pass an iterable of batches that can be gone through again at every evaluation (a list, a "
    "DataLoader, a callable that returns one)"
)
EMPTY = f"the evaluation data are empty: they hold no batch; {AGAIN}"


class EvaluationData:
    """A second data source, looked at before training: what that has read is used.

    Args:
        batches: It.
        seed: As for `read_batches`.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self._batches = batches
        self._seed = seed
        self._ahead: tuple[Any, Generator[Any]] | None = None  # a first batch, and what follows
        self._passes = 0

    def look(self) -> None:
        """Looks whether there is a first batch; what knows its length is not read.

        Raises:
            DataError: There is none, or reading it failed.
        """
        length = length_of(self._batches)
        if length is None:  # of a callable, or of a stream
            # Read again, a stream might lack this batch: it is kept for the first evaluation.
            reading = read_batches(self._batches, self._seed)
            first = next(reading, _END)
            length = int(first is not _END)
            self._ahead = (first, reading)
        if not length:
            self.close()
            raise DataError(EMPTY)

    def __call__(self) -> Iterator[Any]:
        """One time through them.

        Raises:
            DataError: Reading failed, or nothing is left after an earlier time.
        """
        self._passes += 1
        count = 0
        ahead, self._ahead = self._ahead, None
        reading = read_batches(self._batches, self._seed) if ahead is None else ahead[1]
        with closing(reading):
            for batch in reading if ahead is None else chain(ahead[:1], reading):
                count += 1
                yield batch
        if not count and self._passes > 1:
            raise DataError(
                f"the evaluation data hold no batch at evaluation {self._passes}, after some at "
                f"the first: they can be gone through only once; {AGAIN}, or leave out eval_every "
                "(evaluation.every_steps) for one evaluation at the end"
            )

    def close(self) -> None:
        """Ends a reading that was begun and not used; safe to call twice."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].close()


def check_dtypes(batch: Any, trained: BatchSpec) -> None:
    """Compares what a model is to predict from with what it trains on, as far as that is told.

    A model whose parameters are float32 fails on float64, which is what NumPy makes, and does so
    on a rank that others wait for.

    Raises:
        DataError: A tensor has another kind of numbers.
    """
    dtypes: list[Any] = [None] * trained.structure.num_leaves
    for leaf, dtype in zip(trained.tensor_leaves, trained.dtypes, strict=True):
        dtypes[leaf] = dtype
    known = pytree.tree_unflatten(dtypes, trained.structure)
    if isinstance(batch, dict) and isinstance(known, dict):
        pairs = [(repr(name), batch[name], known[name]) for name in batch if name in known]
    else:
        rows = [x if isinstance(x, (tuple, list)) else [x] for x in (batch, known)]
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(*rows, strict=False))]
    for name, tensor, dtype in pairs:
        if not isinstance(tensor, torch.Tensor) or not isinstance(dtype, torch.dtype):
            continue
        both_whole = not (tensor.is_floating_point() or dtype.is_floating_point)
        if tensor.dtype != dtype and not both_whole:
            raise DataError(
                f"tensor {name} of a batch to predict from is {tensor.dtype}; the model trains on "
                f"{dtype}: convert it, for example tensor.to({dtype})"
            )


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
