"""Reading single samples of a map-style data set, and making a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.train.data._order import Indices
from raypar.train.data.form import plain
from raypar.train.data.pad import as_sequence, round_up
from raypar.train.data.randomness import seed_sample

Collate = Callable[[list[Any]], Any]


class Rows(Protocol):
    """What samples can be read from, by index."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, seed: int, epochs: Indices, indices: Indices) -> Any:
        """The batch of the samples at `indices`, each in its epoch.

        Raises:
            DataError: A sample cannot be read, or they make no batch.
        """


class DatasetRows:
    """Samples of anything with ``__len__`` and ``__getitem__``.

    Args:
        dataset: The samples.
        collate_fn: Makes a batch of a list of samples; None stacks tensors, arrays and numbers.
    """

    def __init__(self, dataset: Any, collate_fn: Collate | None = None) -> None:
        self._dataset = dataset
        self._collate = collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, seed: int, epochs: Indices, indices: Indices) -> Any:
        """See `Rows`. What a sample draws from global random states depends on nothing else."""
        together = getattr(self._dataset, "__getitems__", None)
        if together is None:
            samples = [
                self._one(seed, int(epoch), int(index))
                for epoch, index in zip(epochs, indices, strict=True)
            ]
        else:  # some data sets (Hugging Face's) read many at once a hundred times as fast
            samples = self._many(together, seed, epochs, indices)
        collate = self._collate or default_collate
        try:
            return plain(collate(samples))
        except DataError:
            raise
        except Exception as error:
            if self._collate is not None:
                raise DataError(
                    f"collate_fn raised {type(error).__name__}: {error}; it was given "
                    f"{len(samples)} samples, of which the first is {_form(samples[0])}"
                ) from error
            raise DataError(
                self._unlike(samples, indices)
                or f"making a batch of {len(samples)} samples raised {type(error).__name__}: "
                f"{error}; the first one is {_form(samples[0])}. Samples are tensors, arrays, "
                "numbers, or tuples and dicts of them; for others give "
                "raypar.batches(..., collate_fn=...)"
            ) from error

    def _one(self, seed: int, epoch: int, index: int) -> Any:
        seed_sample(seed, epoch, index)
        try:
            return self._dataset[index]
        except Exception as error:
            raise self._raised(error, f"dataset[{index}]") from error

    def _many(self, read: Any, seed: int, epochs: Indices, indices: Indices) -> list[Any]:
        samples: list[Any] = []
        for epoch in sorted({int(e) for e in epochs}):
            wanted = [int(i) for i in indices[epochs == epoch]]
            seed_sample(seed, epoch, wanted[0])
            try:
                found = list(read(wanted))
            except Exception as error:
                raise self._raised(error, f"dataset.__getitems__({wanted!r:.60})") from error
            if len(found) != len(wanted):
                raise DataError(
                    f"dataset.__getitems__ was asked for {len(wanted)} samples and returned "
                    f"{len(found)}; return one for each index"
                )
            samples += found
        return samples

    def _raised(self, error: Exception, call: str) -> DataError:
        return DataError(
            f"{call} raised {type(error).__name__}: {error} (a {type(self._dataset).__name__} of "
            f"{len(self._dataset)} samples)"
        )

    def _unlike(self, samples: Sequence[Any], indices: Indices) -> str | None:
        first = _form(samples[0])
        for sample, index in zip(samples, indices, strict=True):
            if _form(sample) != first:
                return (
                    f"the samples of a batch differ: dataset[{int(indices[0])}] is {first}, "
                    f"dataset[{int(index)}] is {_form(sample)}. Where only their length differs, "
                    f"give raypar.batches(..., collate_fn=raypar.PadTo({_enough(samples)})), which "
                    "pads them; else bring them to one form in the data set, or give a collate_fn "
                    "of yours"
                )
        return None


def _form(sample: Any) -> str:
    """Structure, shapes and dtypes of a sample, in words."""

    def word(leaf: Any) -> str:
        if isinstance(leaf, list):
            return f"list of {len(leaf)} numbers"
        if isinstance(leaf, torch.Tensor) or hasattr(leaf, "dtype"):
            dtype = str(leaf.dtype).removeprefix("torch.")
            return f"{type(leaf).__name__}{list(getattr(leaf, 'shape', ()))} {dtype}"
        return type(leaf).__name__

    made = pytree.tree_map(word, plain(sample), is_leaf=_is_sequence)
    return str(made).replace("'", "")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) and isinstance(as_sequence(value), torch.Tensor)


def _enough(samples: Sequence[Any]) -> int:
    """A length that holds all sequences of some samples."""
    leaves = pytree.tree_leaves([plain(s) for s in samples], is_leaf=_is_sequence)
    found = [as_sequence(leaf) for leaf in leaves]
    lengths = [len(x) for x in found if isinstance(x, torch.Tensor) and x.ndim]
    return round_up(max(lengths, default=1))
