"""The same data with every batch converted (to another dtype, say)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from raypar.train.data._order import Indices
from raypar.train.data.opening import Data
from raypar.train.data.rows import Rows
from raypar.train.data.samples import SampledBatches

Convert = Callable[[Any], Any]

# By these a source is told where to go on, or tells whether its length can be relied on.
_PASSED_ON = ("state_dict", "load_state_dict", "set_epoch", "head", "dataset")


def converted(data: Data, convert: Convert) -> Data:
    """`data` whose batches have gone through `convert`; all else stays as it is.

    What ranks read themselves they still do, what has a state keeps it, and what starts anywhere
    still does.

    Args:
        data: As for the trainer.
        convert: Maps a batch to a batch, row by row; picklable, if `data` is.
    """
    if isinstance(data, SampledBatches):
        return dataclasses.replace(data, rows=_ConvertedRows(data.rows, convert))
    if callable(data) and not isinstance(data, Iterable):
        return _ConvertedCall(data, convert)
    return _Once(data, convert) if isinstance(data, Iterator) else _Again(data, convert)


class _ConvertedRows:
    def __init__(self, rows: Rows, convert: Convert) -> None:
        self._rows = rows
        self._convert = convert

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, seed: int, epochs: Indices, indices: Indices) -> Any:
        return self._convert(self._rows.read(seed, epochs, indices))


class _Converted:
    def __init__(self, batches: Any, convert: Convert) -> None:
        self._batches = batches
        self._convert = convert

    def __getattr__(self, name: str) -> Any:
        # Only for what this class lacks; before __init__, as while unpickling, that is all.
        if name in _PASSED_ON:
            return getattr(self.__dict__["_batches"], name)
        raise AttributeError(name)


class _Again(_Converted):
    def __iter__(self) -> Iterator[Any]:
        return map(self._convert, self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _Once(_Converted):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._convert(next(self._batches))


class _ConvertedCall:
    def __init__(self, call: Callable[..., Any], convert: Convert) -> None:
        self._call = call
        self._convert = convert

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._call)

    def __call__(self, **place: int) -> Any:
        return converted(self._call(**place), self._convert)
