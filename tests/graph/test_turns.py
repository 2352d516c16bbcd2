"""Threads that take turns to trace never wait for each other for ever."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.graph.turns import TRACING
from raypar.programs import _op_template


def test_a_graph_is_looked_at_while_another_thread_plans() -> None:
    first, second = (rp.capture(nn.Linear(4, 1), torch.ones(4, 4), torch.sum) for _ in range(2))
    looks, done = threading.Event(), threading.Event()

    def look() -> None:
        looks.set()
        assert first.analysis is not None

    def plan() -> None:
        with TRACING:
            threading.Thread(target=look, daemon=True).start()
            looks.wait(30)
            # The other thread has nothing to do now but to come to the turn, and wait for it.
            done.wait(0.5)
            assert second.max_replicas
        done.set()

    threading.Thread(target=plan, daemon=True).start()
    assert done.wait(30), "both threads wait for what the other one holds"


def test_a_search_traces_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[bool] = []
    make = _op_template.make_fx

    def look() -> None:
        free.append(TRACING.acquire(blocking=False))
        if free[-1]:
            TRACING.release()

    def traced(*args: Any, **named: Any) -> Any:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return make(*args, **named)

    monkeypatch.setattr(_op_template, "make_fx", traced)
    monkeypatch.setattr(_op_template, "_known", {})
    graph = rp.capture(nn.Linear(4, 1), torch.ones(4, 4), torch.sum)
    rp.plan(graph, rp.Cluster.local(2), rp.SearchConfig(planner="alpa", microbatches=2))
    assert free
    assert not any(free)
