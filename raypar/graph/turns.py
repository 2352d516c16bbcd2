"""Whose turn it is to trace: torch's tracing and seeding use state of the whole process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")

TRACING = threading.RLock()
"""Held by the thread that captures, traces for a search, lowers, or builds a rank; so several runs
of one process, each on its own thread, can be brought up at the same time."""


def in_turn(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """The function, run by one thread of the process at a time."""

    @functools.wraps(function)
    def taking_turns(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with TRACING:
            return function(*args, **kwargs)

    return taking_turns


if TYPE_CHECKING:
    kept_in_turn = functools.cached_property
else:

    class kept_in_turn(functools.cached_property):  # noqa: N801 (a decorator, as its base)
        """A cached property whose computation may trace.

        Up to Python 3.11 a cached property is computed under a lock of its own, which all instances
        share. Taken before the turn by one thread, and after it by another, the two would wait for
        each other for ever.
        """

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            with TRACING:
                return super().__get__(instance, owner)
