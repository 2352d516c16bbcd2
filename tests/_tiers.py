"""The two tiers of tests: what every change has to pass, and `make test-all`.

A test, or a case of one, that repeats what another test shows is marked `thorough`; `make test`
leaves it out. A test with random examples is in both tiers, with fewer of them in the first one.
"""

from __future__ import annotations

import os

THOROUGH = "RAYPAR_THOROUGH" in os.environ
"""Whether the thorough tier was asked for: `make test-all` sets it."""


def examples(first: int, thorough: int) -> int:
    """How many examples hypothesis tries: `first`, or `thorough` in the tier of that name."""
    return thorough if THOROUGH else first
