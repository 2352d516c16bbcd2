"""In which order the samples of an epoch come: a pure function of (seed, epoch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raypar.train.data.randomness import mixed

Indices = npt.NDArray[np.int64]

_TABLE = 1 << 20  # up to here an epoch is a table: 8 MiB, 40 ms; beyond, a step would wait for it
_ROUNDS = 6


class EpochOrder:
    """The order of all epochs over `length` samples; `at` looks up any part of any epoch.

    Args:
        length: Samples of an epoch.
        seed: Seed of all orders; None leaves the samples in their own order.
    """

    def __init__(self, length: int, seed: int | None) -> None:
        self._length = length
        self._seed = seed
        self._table: tuple[int, Indices] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # made again in a moment where it is needed

    def at(self, epoch: int, places: Indices) -> Indices:
        """The samples at `places` (each below `length`) of an epoch's order."""
        if self._seed is None:
            return places
        key = mixed(self._seed, epoch)
        if self._length > _TABLE:
            return _walked(places, self._length, key)
        table = self._table  # threads of several ranks may look up two epochs at once
        if table is None or table[0] != epoch:
            generator = torch.Generator().manual_seed(key)
            order: Any = torch.randperm(self._length, generator=generator).numpy()
            self._table = table = (epoch, order)
        return table[1][places]


def _walked(places: Indices, length: int, key: int) -> Indices:
    """A permutation of 0 to length - 1 that needs no table.

    A Feistel network permutes the numbers of an even count of bits, and what falls outside is put
    through again until it is inside (cycle walking; Black and Rogaway, Ciphers with arbitrary
    finite domains, 2002, sections 3 and 4).
    """
    half = ((length - 1).bit_length() + 1) // 2
    found = _feistel(places.astype(np.uint64), half, key)
    while True:
        outside = found >= length
        if not outside.any():
            return found.astype(np.int64)
        found[outside] = _feistel(found[outside], half, key)


def _feistel(numbers: npt.NDArray[np.uint64], half: int, key: int) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = numbers >> np.uint64(half), numbers & mask
    for round_number in range(_ROUNDS):
        mix = _hashed(right ^ np.uint64(mixed(key, round_number)))
        left, right = right, left ^ (mix & mask)
    return (left << np.uint64(half)) | right


def _hashed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
