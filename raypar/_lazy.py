"""Names of a package that are imported at first use, so that importing it costs little."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package has as its ``__getattr__``.

    Args:
        package: Its ``__name__``.
        homes: Name → module that has it, or ``module:name`` where it is called otherwise there.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, _, own = homes[name].partition(":")
        value = getattr(importlib.import_module(home), own or name)
        setattr(sys.modules[package], name, value)  # is not asked for again
        return value

    return find
