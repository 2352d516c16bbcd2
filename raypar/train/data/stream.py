"""Batches from anything that yields them: pass after pass, from any position, telling the next."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raypar.errors import DataError
from raypar.train.data.join import joined
from raypar.train.data.position import DataPosition, NotPlainError, decoded, encoded
from raypar.train.data.randomness import RandomState, own_turn
from raypar.train.data.workers import advice

_log = logging.getLogger("raypar.data")
_SLOW_S = 10.0
_FRESH = DataPosition()
_END: Any = object()


@dataclass(frozen=True)
class Mark:
    """A `DataPosition` before it is made plain, which takes longer than reading a small batch."""

    samples: int
    epoch: int
    index: int
    source: Any = None
    random: RandomState | None = None

    def position(self) -> DataPosition:
        """The position that it marks."""
        random = None if self.random is None else self.random.to_json()
        return DataPosition(self.samples, self.epoch, self.index, self.source, random)


class Passes:
    """A source that can be gone through once, again and again, or from any sample on.

    Args:
        batches: The batches, from the first; never used where `call` starts anywhere.
        call: What makes them, if it takes ``epoch`` or ``start_sample``; see `keywords_of`.
        loader: What has ``state_dict`` and ``load_state_dict``, if something does.
        one_shot: Whether `batches` can be gone through only once.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        call: Callable[..., Iterable[Any]] | None = None,
        loader: Any = None,
        one_shot: bool = False,
    ) -> None:
        self._batches = batches
        self._call = call
        self._keywords = () if call is None else keywords_of(call)
        self._restored = False
        self.loader = loader
        self.one_shot = one_shot
        # A list draws nothing, and its states would be read for every pass over [batch].
        self.draws = not isinstance(batches, (list, tuple)) and not one_shot

    @property
    def length(self) -> int | None:
        """Batches of one pass, where that is certain."""
        return None if self._keywords or self.one_shot else length_of(self._batches)

    def restore(self, state: Any) -> None:
        """Has the next pass begin where `state` (`encoded`) was taken.

        Raises:
            DataError: The loader has no use for it, or refuses it.
        """
        if self.loader is None:
            raise DataError(
                "the saved position holds the state of a loader, but this data source has no "
                "load_state_dict: resume with the loader that the run was started with"
            )
        try:
            self.loader.load_state_dict(decoded(state))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{type(self.loader).__name__}.load_state_dict raised {type(error).__name__}: "
                f"{error}; resume with the loader that the run was started with"
            ) from error
        self._restored = True

    def begin(self, epoch: int, index: int) -> tuple[Iterator[Any], int]:
        """An iterator of pass `epoch`, and the samples of it that are still to be skipped."""
        source = self.loader if self._restored else self._batches
        if not self._keywords:
            tell = getattr(source, "set_epoch", None)
            if callable(tell):  # the name that torch's and Hugging Face's sources have for it
                tell(epoch)
            skip, self._restored = 0 if self._restored else index, False
            return iter(source), skip
        found = called(self._call, epoch, index)
        return iter(found), 0 if "start_sample" in self._keywords else index

    def state(self) -> Any:
        """What the loader tells of where it is, in plain form, or None."""
        if self.loader is None:
            return None
        try:
            return encoded(self.loader.state_dict())
        except NotPlainError as error:
            _log.warning("%s; a resume will read from the start of the epoch", error)
            self.loader = None
            return None


def keywords_of(call: Callable[..., Any]) -> tuple[str, ...]:
    """Which of ``epoch`` and ``start_sample`` a callable takes."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # a C function without a signature
        return ()
    return tuple(n for n in ("epoch", "start_sample") if n in parameters)


def called(call: Callable[..., Any] | None, epoch: int, index: int) -> Any:
    """What a data callable returns for a pass from a sample on, as far as it takes these."""
    assert call is not None
    values = {"epoch": epoch, "start_sample": index}
    return call(**{name: values[name] for name in keywords_of(call)})


def length_of(batches: Any) -> int | None:
    """``len`` of what has one that can be relied on."""
    # The length of a loader over an iterable data set is a guess that torch itself warns of.
    data_set = getattr(batches, "dataset", None)
    if data_set is not None and not hasattr(data_set, "__len__"):
        return None
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def read(
    passes: Passes, *, size: int = 1, start: DataPosition = _FRESH, epochs: int | None = None
) -> Iterator[tuple[Any, Mark]]:
    """Batches from `start` on, each with the mark after it.

    Args:
        passes: The source.
        size: Samples of each batch.
        start: Where to begin.
        epochs: End, without an error, after so many passes; None goes on for ever.

    Raises:
        DataError: The source raised, or ended for good before `epochs`.
    """
    epoch, samples, index = start.epoch, start.samples, start.index
    if start.random is not None:
        RandomState.from_json(start.random).set()
    if start.source is not None:
        passes.restore(start.source)
    resumed = start.source is not None or index > 0
    length = passes.length
    while epochs is None or epoch < epochs:
        found = 0
        try:
            with own_turn():  # what an evaluation draws meanwhile is none of this source's
                random = RandomState.now() if passes.draws else None
                iterator, skipped = passes.begin(epoch, index)
                _skip(iterator, skipped // size)
            while True:
                with own_turn():
                    batch = next(iterator, _END)
                    ends = length is not None and index + size >= length * size
                    after = RandomState.now() if ends and passes.draws else None
                if batch is _END:
                    break
                index += size
                samples += size
                found += 1
                if ends:
                    yield batch, Mark(samples, epoch + 1, 0, passes.state(), after)
                else:
                    yield batch, Mark(samples, epoch, index, passes.state(), random)
        except DataError:
            raise
        except Exception as error:
            raise raised(error, samples // size) from error
        if passes.one_shot and epochs == epoch + 1:
            return
        # Saved at the very end of a pass, a source may have nothing more of it: that is no end.
        if passes.one_shot or not (found or resumed):
            raise DataError(_ended(samples // size))
        epoch += 1 if index else 0
        index, resumed = 0, False


def grouped(
    marked: Iterator[tuple[Any, Mark]], count: int, batch_dims: Any
) -> Iterator[tuple[Any, Mark]]:
    """Every `count` batches in a row as one; see `joined`. What is left over at the end is not."""
    if count == 1:
        yield from marked
        return
    held: list[Any] = []
    for batch, mark in marked:
        held.append(batch)
        if len(held) == count:
            yield joined(held, batch_dims), mark
            held = []


def all_epochs(batches: Iterable[Any]) -> Iterator[Any]:
    """Goes through `batches` again and again, or once if that is all it can.

    Raises:
        DataError: Each time something is wrong with the source: it raised, or it ended.
    """
    one_shot = isinstance(batches, Iterator)
    return (batch for batch, _ in read(Passes(batches, one_shot=one_shot)))


def raised(error: Exception, count: int) -> DataError:
    """What to tell of an error in the user's code, reading the batch of step `count`."""
    return DataError(
        f"the data source raised {type(error).__name__} after {_count(count)}, reading the batch "
        f"of step {count}: {error}{advice(error)}"
    )


def _skip(iterator: Iterator[Any], count: int) -> None:
    """Reads over the batches that were consumed before the run was interrupted."""
    began = time.monotonic()
    for done in range(count):
        if next(iterator, _log) is _log:
            raise DataError(
                f"the run had read {_count(count)} of this epoch when it was saved, and the data "
                f"source has {done} now: resume with the data that the run was started with"
            )
    seconds = time.monotonic() - began
    if seconds > _SLOW_S:
        _log.warning(
            "resuming: read over %s in %.0f s. A map-style dataset (raypar.batches), a loader "
            "with state_dict, or a callable that takes start_sample resumes at once",
            _count(count),
            seconds,
        )


def _ended(count: int) -> str:
    return (
        f"the data source ended after {_count(count)}: step {count} (counted from 0) has no batch. "
        f"A one-shot iterator is not repeated: pass something that can be iterated again (a list, "
        f"a DataLoader, a callable that returns one), a callable that takes epoch, which is called "
        f"for each pass, or set steps={count}"
    )


def _count(count: int) -> str:
    return f"{count} batch" if count == 1 else f"{count} batches"
