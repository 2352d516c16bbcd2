"""Samples of different lengths in batches of one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from raypar.errors import DataError
from raypar.train.data.form import plain


@dataclass(frozen=True)
class PadTo:
    """A ``collate_fn`` that pads sequences to one length and stacks the samples.

    raypar compiles the shapes of a batch in, so that every batch has to be as long as the first
    one: padding to the longest sample of each batch will not do. Each sample is padded by itself,
    and so every rank still reads its own rows alone (`raypar.batches`). It may be the
    ``collate_fn`` of a torch DataLoader, too.

    Args:
        length: The length of all sequences.
        fill: What stands behind their ends: a number, for every tensor of a sample that has the
            dim; or fields with a number each, such as ``{"tokens": 0, "labels": -100}``, and only
            these are padded. Fields are keys of a dict, or places in a tuple. -100 is what
            `torch.nn.functional.cross_entropy` leaves out.
        dim: Dim of a sample's tensors that is padded.
        truncate: Whether what is longer is cut, in place of an error.

    Raises:
        DataError: `length` or `dim` is out of range.
    """

    length: int
    fill: float | Mapping[str | int, float] = 0
    dim: int = 0
    truncate: bool = False

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("dim", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DataError(
                    f"PadTo.{name} is {value!r}; give a whole number of at least {least}"
                )

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of some samples.

        Raises:
            DataError: A sequence is longer than `length`, or lacks a field or the dim.
        """
        return default_collate([self._padded(plain(sample)) for sample in samples])

    def _padded(self, sample: Any) -> Any:
        if not isinstance(self.fill, Mapping):
            return self._all(sample, self.fill, "a sample")
        missing = [key for key in self.fill if not _has(sample, key)]
        if missing:
            raise DataError(
                f"PadTo(fill=...) names the field {missing[0]!r}, and a sample has "
                f"{_fields(sample)}: name some of these, or give fill a number, for all of them"
            )
        wanted = self.fill
        return _mapped(
            sample,
            lambda key, value: (
                self._one(as_sequence(value), wanted[key], repr(key)) if key in wanted else value
            ),
        )

    def _all(self, value: Any, fill: float, name: str) -> Any:
        """Every tensor in a value that has the dim, padded."""
        found = as_sequence(value)
        if isinstance(found, torch.Tensor):
            return self._one(found, fill, name) if found.ndim > self.dim else found
        if isinstance(found, (dict, list, tuple)):
            return _mapped(found, lambda key, part: self._all(part, fill, repr(key)))
        return found

    def _one(self, value: Any, fill: float, name: str) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or value.ndim <= self.dim:
            form = list(value.shape) if isinstance(value, torch.Tensor) else ""
            raise DataError(
                f"PadTo is to pad {name} along dim {self.dim}, and it is {type(value).__name__}"
                f"{form}: name fields in fill that are sequences of numbers"
            )
        long = value.shape[self.dim]
        if long > self.length:
            if not self.truncate:
                raise DataError(
                    f"{name} has length {long}, PadTo(length={self.length}) takes no more than "
                    f"{self.length}: set length={round_up(long)} or more, or truncate=True, which "
                    "cuts it"
                )
            return value.narrow(self.dim, 0, self.length)
        rest = list(value.shape)
        rest[self.dim] = self.length - long
        return torch.cat([value, value.new_full(rest, fill)], self.dim)


def as_sequence(value: Any) -> Any:
    """A value, where it is an array or a list of numbers as a tensor."""
    if isinstance(value, np.ndarray):
        return plain(value)
    numbers = isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value)
    return torch.as_tensor(value) if numbers else value


def round_up(length: int) -> int:
    """The next multiple of 8, which devices like."""
    return -(-length // 8) * 8


def _has(sample: Any, key: str | int) -> bool:
    if isinstance(sample, dict):
        return key in sample
    return isinstance(sample, (list, tuple)) and key in range(len(sample))


def _fields(sample: Any) -> str:
    if isinstance(sample, dict):
        return ", ".join(map(repr, sample))
    if isinstance(sample, (list, tuple)):
        return f"the places 0 to {len(sample) - 1}"
    return f"none: it is {type(sample).__name__}"


def _mapped(sample: Any, change: Callable[[Any, Any], Any]) -> Any:
    if isinstance(sample, dict):
        return {key: change(key, value) for key, value in sample.items()}
    return tuple(change(place, value) for place, value in enumerate(sample))
