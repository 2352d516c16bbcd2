"""Every plan that a test of this room simulates is held against its lower bound."""

from __future__ import annotations

from typing import Any

import pytest

from raypar.search import simulate as module
from raypar.search.bounds import Bound, lower_bound
from raypar.search.config import SearchConfig


@pytest.fixture(autouse=True)
def _bounds_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wraps what `simulate` calls, so that it does not matter how a caller imported it.

    The bound is that of the plan's own replicas and microbatches, which is at least that of all
    plans. Plans played by another cost model, or with fewer cores than devices,
    have no bound.
    """
    make, play = module.setting_of, module.simulate_lists
    asked: dict[int, tuple[Any, ...]] = {}
    bounds: dict[tuple[int, ...], tuple[Any, Bound]] = {}

    def bound_of(graph: Any, plan: Any, cluster: Any, calibration: Any) -> Bound:
        """A planner plays many plans of one kind: their bound is computed once."""
        given = (graph, cluster, calibration)  # kept, so that no other has their identities
        key = (*map(id, given), plan.replicas, plan.microbatches)
        if key not in bounds:
            told = SearchConfig(replicas=plan.replicas, microbatches=plan.microbatches)
            bounds[key] = given, lower_bound(*given, told)
        return bounds[key][1]

    def setting_of(*given: Any) -> Any:
        setting = make(*given)
        asked[id(setting)] = (setting, *given)
        return setting

    def simulate_lists(lists: Any, setting: Any, **more: Any) -> Any:
        played = play(lists, setting, **more)
        known = asked.pop(id(setting), None)
        if known is not None:
            _, graph, plan, _, cluster, calibration, cost, cores, _ = known
            if cost == "analytic" and cores is None:
                bound = bound_of(graph, plan, cluster, calibration)
                assert bound.step_s <= played.step_s, (bound, played.step_s, plan)
        return played

    monkeypatch.setattr(module, "setting_of", setting_of)
    monkeypatch.setattr(module, "simulate_lists", simulate_lists)
