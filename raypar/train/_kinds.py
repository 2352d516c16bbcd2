"""What kind of value a setting may be; told here, and not by whatever meets another kind first."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from raypar.errors import ConfigError

NUMBER: Any = Real
NONE: Any = type(None)


def check_kinds(owner: str, given: object, kinds: Mapping[str, tuple[Any, str]]) -> None:
    """Compares fields of `given` with what they may be; a bool is no number.

    Args:
        owner: What the fields belong to, for the error: ``RunConfig.``, say.
        given: Has them.
        kinds: Field → class, or classes, of its values; the same in words, with an example.

    Raises:
        ConfigError: A value is of another kind.
    """
    for name, (kind, wanted) in kinds.items():
        value = getattr(given, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{owner}{name} is {value!r}; give {wanted}")
