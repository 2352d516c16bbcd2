"""The global random states that a user's loader draws from."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypar.errors import DataError

# Samples that are read in this process by the threads of several ranks: one thread at a time, since
# data sets are rarely safe to share (a file has one position), and the random states are global.
_TURN = threading.RLock()


@dataclass(frozen=True)
class RandomState:
    """The states of torch's, numpy's and Python's global generators."""

    torch_state: torch.Tensor
    numpy_state: Any
    python_state: Any

    @classmethod
    def now(cls) -> RandomState:
        """Reads them."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    @classmethod
    def of_seed(cls, seed: int) -> RandomState:
        """The states that `seed` gives, leaving the present ones alone."""
        before = cls.now()
        _seed_all(seed)
        found = cls.now()
        before.set()
        return found

    def set(self) -> None:
        """Makes these the present states."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)

    def to_json(self) -> dict[str, Any]:
        """As plain values: hex texts and numbers."""
        name, keys, place, has_gauss, gauss = self.numpy_state
        version, words, next_gauss = self.python_state
        return {
            "torch": self.torch_state.numpy().tobytes().hex(),
            "numpy": [name, keys.tobytes().hex(), int(place), int(has_gauss), float(gauss)],
            "python": [version, np.array(words, np.uint32).tobytes().hex(), next_gauss],
        }

    @classmethod
    def from_json(cls, value: Any) -> RandomState:
        """Reads what `to_json` gave.

        Raises:
            DataError: It is something else.
        """
        try:
            name, keys, place, has_gauss, gauss = value["numpy"]
            version, words, next_gauss = value["python"]
            state = bytearray.fromhex(value["torch"])
            numpy_keys = np.frombuffer(bytes.fromhex(keys), np.uint32)
            python_words = np.frombuffer(bytes.fromhex(words), np.uint32)
            found = cls(
                torch.frombuffer(state, dtype=torch.uint8),
                (str(name), numpy_keys, int(place), int(has_gauss), float(gauss)),
                (int(version), tuple(map(int, python_words)), next_gauss),
            )
            found._try()
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"a saved position's random states cannot be read: {type(error).__name__}: {error}"
            ) from None
        return found

    def _try(self) -> None:
        """Raises where the generators do not take the states."""
        torch.Generator().set_state(self.torch_state)
        np.random.RandomState().set_state(self.numpy_state)
        random.Random().setstate(self.python_state)


@contextmanager
def own_turn() -> Iterator[None]:
    """While open, no other thread of raypar reads a user's data, or swaps the random states."""
    with _TURN:
        yield


@contextmanager
def reading_samples() -> Iterator[None]:
    """While open, this thread alone reads samples; at the end the random states are as before."""
    with _TURN:
        before = RandomState.now()
        try:
            yield
        finally:
            before.set()


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Makes what a sample draws a function of (seed, epoch, its index) alone.

    So a random crop is the same whichever rank or worker process reads the sample, and after a
    resume.
    """
    _seed_all(mixed(mixed(seed, epoch), index))


def mixed(a: int, b: int) -> int:
    """A 63-bit number that depends on all bits of both (the finaliser of splitmix64)."""
    mask = (1 << 64) - 1
    x = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
