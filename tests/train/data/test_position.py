"""Positions survive JSON, and nothing else passes for one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypar.errors import DataError
from raypar.train.data import DataPosition, RandomState
from raypar.train.data.position import NotPlainError, decoded, encoded

STATE = {
    "generator": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "none": torch.empty(0, 3),
    "array": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "number": np.float64(0.25),
    "worker": {0: {"at": 3, "seen": (1, b"\x00\xff", None)}, "__raypar__": "tensor"},
    "list": [True, "text", 1 << 70, float("inf")],
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(map(equal, a, b)) and len(a) == len(b)
    return bool(a == b)


def test_a_loaders_state_of_tensors_bytes_and_odd_keys_survives_json() -> None:
    assert equal(STATE, decoded(json.loads(json.dumps(encoded(STATE)))))


def test_what_has_no_plain_form_is_refused_by_its_type() -> None:
    with pytest.raises(NotPlainError, match="Generator"):
        encoded({"generator": torch.Generator()})
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(NotPlainError, match="deep"):
        encoded(deep)


def test_random_states_survive_json() -> None:
    before = RandomState.now()
    state = RandomState.of_seed(5)
    again = RandomState.from_json(json.loads(json.dumps(state.to_json())))
    drawn = []
    for one in (state, again):
        one.set()
        drawn.append((torch.rand(3).tolist(), np.random.rand(), torch.randperm(4).tolist()))
    before.set()
    assert drawn[0] == drawn[1]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(["samples", "epoch", "index", "source", "random", "__raypar__", "shape"])
KINDS = st.sampled_from(["tensor", "array", "bytes", "dict", "tuple", "code"])


@given(PLAIN | st.dictionaries(FIELDS, PLAIN | st.fixed_dictionaries({"__raypar__": KINDS})))
def test_anything_that_is_no_position_is_refused_in_words(value: Any) -> None:
    for read in (DataPosition.from_json, RandomState.from_json, decoded):
        try:
            found = read(value)
        except DataError:
            continue
        if isinstance(found, DataPosition):
            assert DataPosition.from_json(found.to_json()) == found


def test_a_position_names_what_is_wrong_with_it() -> None:
    assert DataPosition.from_json({}) == DataPosition()
    with pytest.raises(DataError, match="index is -1"):
        DataPosition.from_json({"index": -1})
    with pytest.raises(DataError, match="no position in the data: expected"):
        DataPosition.from_json({"step": 3})
