"""What a third party tests its own models, schedules, planners and comm backends with.

The names are imported at first use: the conformance suites need hypothesis (extra ``dev``).

- `random_plan`, `run_plan`, `assert_plan_equivalent`: a plan trains exactly like the unsplit model.
- `CommConformance`, `SCHEDULE_CHECKS`, `PLANNER_CHECKS`: one suite per plug-in family.
- `raypar.testing.models`: the zoo of models that every plan has to train exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypar._lazy import lazy

if TYPE_CHECKING:
    from raypar.testing.comm import CommConformance
    from raypar.testing.equivalence import RunRecord, assert_plan_equivalent, run_plan
    from raypar.testing.planners import CHECKS as PLANNER_CHECKS
    from raypar.testing.plans import random_plan
    from raypar.testing.schedules import CHECKS as SCHEDULE_CHECKS
    from raypar.testing.sharding import random_sharding

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

__getattr__ = lazy(
    __name__,
    {
        "PLANNER_CHECKS": "raypar.testing.planners:CHECKS",
        "SCHEDULE_CHECKS": "raypar.testing.schedules:CHECKS",
        "CommConformance": "raypar.testing.comm",
        "RunRecord": "raypar.testing.equivalence",
        "assert_plan_equivalent": "raypar.testing.equivalence",
        "random_plan": "raypar.testing.plans",
        "random_sharding": "raypar.testing.sharding",
        "run_plan": "raypar.testing.equivalence",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
