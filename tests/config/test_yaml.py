"""YAML that is broken, hostile or far too large: a ConfigError that says where, and soon."""

from __future__ import annotations

import pytest

from raypar._yaml import dump_yaml, parse_yaml
from raypar.errors import ConfigError

_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_BOMB, "line 6, .* more than 100,000 values"),
        ("a: &a [1, *a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 5000, "nested far too deeply"),
        ("x" * (1 << 20) + "y", "1,048,577 characters"),
        ("x: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("x: 2001-99-99", "month"),
        ("x: !!int ten", "invalid literal"),
        ("x: !!timestamp now", "wrong form"),
        ("x: " + "1" * 5000, "wrong form"),
        ("? [a]\n: b", "unhashable"),
        ("a: 1\na: 2", "line 2, .*'a' is given twice"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert len(str(caught.value)) < 400


def test_aliases_that_are_meant_work() -> None:
    found = parse_yaml("a: &a {b: [1, 1e-3]}\nc: [*a, *a]", "x")
    found["a"]["b"].append(2)
    assert found["c"] == [{"b": [1, 1e-3]}] * 2
    value = {"a": ["1e5", "2001-01-01", 1e-05, None, {"b": "no"}]}
    assert parse_yaml(dump_yaml(value), "x") == value
