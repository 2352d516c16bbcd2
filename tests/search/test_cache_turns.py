"""Of several searches for the same plan one runs, and the others wait for it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raypar.graph.capture import capture
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.plan import search
from raypar.search.planners import base
from raypar.search.planners.base import Planner
from raypar.search.planners.uniform import UniformPlanner


class Slow(Planner):
    """Counts how often it is asked."""

    name = "slow"
    asked = 0

    def plan(self, graph: Any, cluster: Any, config: Any) -> Any:
        type(self).asked += 1
        time.sleep(0.2)
        return UniformPlanner().plan(graph, cluster, replace(config, planner="uniform"))


def test_equal_questions_at_the_same_time_are_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "asked", 0)
    monkeypatch.setitem(base._PLANNERS, "slow", Slow)
    graph = capture(lambda: nn.Linear(4, 1), torch.randn(4, 4), lambda out: out.sum())
    folder = tmp_path / "shared" / "plans"
    config = SearchConfig(planner="slow", cache=str(folder))
    found: list[Any] = []

    def ask() -> None:
        found.append(search(graph, Cluster.virtual(1, 2), config))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Slow.asked == 1
    assert len({answer.plan.to_json() for answer in found}) == 1
    cached = [any("plan cache" in note for note in answer.record.notes) for answer in found]
    assert sorted(cached) == [False, True, True, True]
    assert len(list(folder.iterdir())) == 1
