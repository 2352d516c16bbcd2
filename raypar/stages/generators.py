"""The states of a process's random generators as tensors."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

_TORCH, _CUDA, _PYTHON, _NUMPY = "torch", "cuda", "python", "numpy"
_WORDS = 624  # of the Mersenne Twister's state, in Python and numpy alike


def random_states(*, accelerator: bool) -> dict[str, torch.Tensor]:
    """The global generators of torch, Python and (if it is loaded) numpy, by name."""
    found = {_TORCH: torch.get_rng_state()}
    if accelerator and torch.cuda.is_available():
        found[_CUDA] = torch.cuda.get_rng_state()
    _, words, gauss = random.getstate()
    found[_PYTHON] = _doubles(words, gauss)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] == "MT19937":
            inner = state["state"]
            words = (*map(int, inner["key"]), int(inner["pos"]))
            found[_NUMPY] = _doubles(words, state["gauss"] if state["has_gauss"] else None)
    return found


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Brings the generators to states that `random_states` gave; one that is missing stays.

    Raises:
        ValueError: They are no such states.
    """
    if _TORCH in states:
        _set(lambda: torch.set_rng_state(states[_TORCH]))
    if _CUDA in states and torch.cuda.is_available():
        _set(lambda: torch.cuda.set_rng_state(states[_CUDA]))
    if _PYTHON in states:
        words, gauss = _words(states[_PYTHON])
        _set(lambda: random.setstate((3, words, gauss)))
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and _NUMPY in states:
        words, gauss = _words(states[_NUMPY])
        key = numpy.array(words[:_WORDS], dtype=numpy.uint32)
        _set(
            lambda: numpy.random.set_state(
                ("MT19937", key, words[_WORDS], int(gauss is not None), gauss or 0.0)
            )
        )


def _set(how: Any) -> None:
    try:
        how()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"no state of a random generator: {error}") from None


def _doubles(words: tuple[int, ...], gauss: float | None) -> torch.Tensor:
    """Whole numbers below 2³², and the normal number kept for later (NaN: none), as float64."""
    return torch.tensor([*words, math.nan if gauss is None else gauss], dtype=torch.float64)


def _words(state: torch.Tensor) -> tuple[tuple[int, ...], float | None]:
    if state.dtype != torch.float64 or tuple(state.shape) != (_WORDS + 2,):
        raise ValueError(f"no state of a Mersenne Twister: {tuple(state.shape)} {state.dtype}")
    *words, gauss = state.tolist()
    if not all(0 <= w < 2**32 and w == int(w) for w in words) or words[-1] > _WORDS:
        raise ValueError("no state of a Mersenne Twister: a number in it is out of range")
    return tuple(map(int, words)), None if math.isnan(gauss) else gauss
