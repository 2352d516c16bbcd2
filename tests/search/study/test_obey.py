"""Options that the user fixed: a plan has them all, or an error says why none can."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import raypar as rp
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.search.config import SearchConfig
from raypar.search.plan import search
from raypar.search.study.obey import disobeyed
from raypar.testing import models


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


@cache
def graph() -> OpGraph:
    case = models.case("autoencoder")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


@pytest.mark.parametrize(
    "fixed",
    [
        {"chunks": 2},
        {"stages": 4, "chunks": 2, "schedule": "interleaved_1f1b"},
        {"stages": 4, "chunks": 2, "schedule": "interleaved_eager"},
        {"stages": 5},
        {"stages": 2, "tensor": 2},
        {"tensor": 3},
        {"stages": 3, "replicas": 2, "zero": 3, "recompute": "full"},
        {"microbatches": 4, "schedule": "gpipe", "stages": 3},
    ],
)
def test_what_is_fixed_is_obeyed(fixed: dict[str, Any]) -> None:
    config = SearchConfig(planner="optuna", seeds=(), trials=6, **fixed)
    plan, record = search(graph(), rp.Cluster.local(6), config)
    assert disobeyed(plan, config) == ""
    kept = [t for t in record.trials if t.state == "kept"]
    assert len(kept) >= 3, "proposals are wasted on what is not asked for"


@pytest.mark.parametrize(
    ("fixed", "devices", "words"),
    [
        ({"chunks": 2}, 1, "need 2 devices"),
        ({"stages": 3, "chunks": 2}, 4, "multiple of 2"),
        ({"chunks": 2, "schedule": "gpipe"}, 4, "train.schedule: interleaved_1f1b"),
        ({"chunks": 100}, 4, "places to cut"),
        ({"stages": 5}, 4, "need 5 devices"),
        ({"tensor": 3, "replicas": 2}, 4, "need 6 devices"),
        ({"schedule": "1f1bb"}, 4, "train.schedule"),
        ({"recompute": "some"}, 4, "search.recompute"),
        ({"zero": 4}, 4, "search.zero"),
    ],
)
def test_what_cannot_be_is_refused(fixed: dict[str, Any], devices: int, words: str) -> None:
    config = SearchConfig(planner="optuna", seeds=(), trials=4, **fixed)
    with pytest.raises(PlanError, match=words):
        search(graph(), rp.Cluster.local(devices), config)


def test_a_seed_that_is_not_what_was_asked_for_cannot_win(tmp_path: Path) -> None:
    free = search(graph(), rp.Cluster.local(2), SearchConfig(planner="alpa")).plan
    assert len(free.stages) != 2
    (tmp_path / "plan.json").write_text(free.to_json())
    config = SearchConfig(
        planner="optuna", seeds=("manual",), trials=6, manual=str(tmp_path / "plan.json"), stages=2
    )
    assert len(search(graph(), rp.Cluster.local(2), config).plan.stages) == 2
