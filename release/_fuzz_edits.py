"""Hypothesis strategies that damage a valid input: trees of values, texts, bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

_MOST_EDITS = 3

_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30,
    10**400, 0.5, -0.0, 1e-320, 1e308, "", "x", "0", "10", "1e9", "data", "none", "null", "~",
    "../../etc/passwd", "/", "a" * 5000, "\0", "\ud800", "é\u202e", "os:system", "$HOME", "{}",
    [], {}, [0], [None], [[0, 0]], [1, 2], ["data"], {"x": 1}, {"": None}, {"format": 99},
    [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip

odd_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(_ODD).map(copy.deepcopy),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    ),
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a tree is, below the root."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


@st.composite
def edited_trees(draw: st.DrawFn, bases: Sequence[Any]) -> Any:
    """One of `bases` with one to three values replaced, dropped, doubled, moved or added."""
    tree = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, _MOST_EDITS))):
        places = list(paths(tree))
        if not places:
            return draw(odd_values)
        *above, key = places[draw(st.integers(0, len(places) - 1))]
        holder = tree
        for step in above:
            holder = holder[step]
        how = draw(st.sampled_from(("put", "put", "put", "drop", "add", "twice", "swap")))
        if how == "put":
            holder[key] = draw(odd_values)
        elif how == "drop":
            del holder[key]
        elif how == "swap":
            *others, other = places[draw(st.integers(0, len(places) - 1))]
            source = tree
            for step in others:
                source = source[step]
            holder[key] = copy.deepcopy(source[other])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]) if how == "twice" else draw(odd_values))
        else:
            name = f"{key}_" if how == "twice" else draw(st.text(max_size=8))
            holder[name] = copy.deepcopy(holder[key])
    return tree


@st.composite
def edited_bytes(draw: st.DrawFn, bases: Sequence[bytes]) -> bytes:
    """One of `bases` with bytes changed, cut out, repeated, put in, or cut off at the end."""
    data = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, _MOST_EDITS))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 40))
        how = draw(st.sampled_from(("change", "change", "cut", "repeat", "put", "end")))
        if how == "change" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + length]
        elif how == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif how == "put":
            data[at:at] = draw(st.binary(max_size=40))
        elif how == "end":
            del data[at:]
    return bytes(data)


def json_inputs(bases: Sequence[Any]) -> st.SearchStrategy[str]:
    """JSON texts: of edited trees mostly, of edited bytes, and some that is anything."""
    texts = [json.dumps(base).encode() for base in bases]
    return st.one_of(
        edited_trees(bases).map(dumped(json.dumps)),
        edited_trees(bases).map(dumped(json.dumps)),
        edited_bytes(texts).map(lambda data: data.decode("utf-8", "replace")),
        st.text(max_size=60),
    )


def dumped(dump: Callable[[Any], str]) -> Callable[[Any], str]:
    """`dump`, for trees that it may not be able to write."""

    def written(tree: Any) -> str:
        try:
            return dump(tree)
        except (ValueError, TypeError):  # a number of more digits than Python writes
            return repr(tree)[:2000]

    return written
