"""What a third party tests its own models, schedules, planners and comm backends with.

The names are imported at first use: the conformance suites need hypothesis (extra ``dev``).

- `random_plan`, `run_plan`, `assert_plan_equivalent`: a plan trains exactly like the unsplit model.
- `CommConformance`, `SCHEDULE_CHECKS`, `PLANNER_CHECKS`: one suite per plug-in family.
- `raypar.testing.models`: the zoo of models that every plan has to train exactly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypar.testing.comm import CommConformance
    from raypar.testing.equivalence import RunRecord, assert_plan_equivalent, run_plan
    from raypar.testing.planners import CHECKS as PLANNER_CHECKS
    from raypar.testing.plans import random_plan
    from raypar.testing.schedules import CHECKS as SCHEDULE_CHECKS

__all__ = [
    "PLANNER_CHECKS",
    "SCHEDULE_CHECKS",
    "CommConformance",
    "RunRecord",
    "assert_plan_equivalent",
    "random_plan",
    "random_sharding",
    "run_plan",
]

_HOMES = {
    "PLANNER_CHECKS": ("raypar.testing.planners", "CHECKS"),
    "SCHEDULE_CHECKS": ("raypar.testing.schedules", "CHECKS"),
    "CommConformance": ("raypar.testing.comm", "CommConformance"),
    "RunRecord": ("raypar.testing.equivalence", "RunRecord"),
    "assert_plan_equivalent": ("raypar.testing.equivalence", "assert_plan_equivalent"),
    "random_plan": ("raypar.testing.plans", "random_plan"),
    "random_sharding": ("raypar.testing.sharding", "random_sharding"),
    "run_plan": ("raypar.testing.equivalence", "run_plan"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raypar.testing' has no attribute {name!r}")
    home, attribute = _HOMES[name]
    value = getattr(importlib.import_module(home), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
