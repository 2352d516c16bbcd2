"""State of learning-rate schedulers and parameter groups as JSON values, and back.

A checkpoint may not hold code, so that nothing in it can run: it holds these values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raypar.errors import OptimizerError

_TUPLE, _COUNTER, _PAIRS, _FLOAT = "$tuple", "$counter", "$pairs", "$float"


def to_plain(value: Any, where: str) -> Any:
    """A value as JSON can hold it.

    Numbers in tensors become numbers; tuples, counters, keys that are no text and floats that are
    not finite are marked, so that `from_plain` gives them back.

    Args:
        value: Numbers, text, None, and lists, tuples and dicts of them.
        where: What it is, for the error.

    Raises:
        OptimizerError: It holds something else, such as a function.
    """
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, list):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: to_plain(list(value), where)}
    if isinstance(value, Mapping):
        pairs = [[k, to_plain(v, f"{where}.{k}")] for k, v in value.items()]
        if isinstance(value, Counter) and all(map(_is_key, value)):
            return {_COUNTER: pairs}
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return dict(pairs)
        if all(map(_is_key, value)):
            return {_PAIRS: pairs}
    raise OptimizerError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: it holds numbers, "
        "text, and lists and dicts of them. Give the class a state_dict() and load_state_dict() of "
        "such values"
    )


def from_plain(value: Any) -> Any:
    """What `to_plain` was given.

    Raises:
        OptimizerError: It is no such value.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_plain(v) for k, v in value.items()}
    mark, inner = next(iter(value.items()))
    alone, many = len(value) == 1, isinstance(inner, list)
    if alone and mark == _FLOAT and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if alone and mark == _TUPLE and many:
        return tuple(from_plain(inner))
    if alone and mark in (_COUNTER, _PAIRS) and many and all(map(_is_pair, inner)):
        found = {k: from_plain(v) for k, v in inner}
        return Counter(found) if mark == _COUNTER else found
    raise OptimizerError(
        f"the saved state holds {str(value)[:80]!r}, which nothing writes: the checkpoint is "
        "damaged, or of a newer raypar"
    )


def _is_key(key: Any) -> bool:
    """Whether JSON can hold a dict's key as a value."""
    return key is None or isinstance(key, (bool, int, str))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_key(value[0])
