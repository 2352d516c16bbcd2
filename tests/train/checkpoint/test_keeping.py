"""Which checkpoints stay, and in what order they are begun and finished."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raypar.errors import CheckpointError
from raypar.stages.run import Run
from raypar.train.checkpoint import CheckpointStore
from raypar.train.checkpoint.storage import LocalStorage
from raypar.train.config import CheckpointConfig
from raypar.train.state import TrainState
from tests.train.checkpoint.runs import losses, plan_of, save, start

PLAN = plan_of("sum_loss", 2, sharded=False)


@pytest.fixture(scope="module")
def running() -> Iterator[Run]:
    with start("sum_loss", PLAN) as run:
        yield run


def kept(tmp_path: Path, run: Run, scores: list[float | None], **config: Any) -> list[int]:
    """Steps of what is there after as many checkpoints with those scores."""
    store = CheckpointStore(tmp_path, CheckpointConfig(**config))
    for step, score in enumerate(scores):
        save(store, run, PLAN, step, **({} if score is None else {"eval": {"loss": score}}))
    store.close()
    return [c.step for c in store.all()]


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"num_to_keep": None}, [0, 1, 2, 3, 4]),
        ({"num_to_keep": 2}, [3, 4]),
        ({"num_to_keep": 1}, [4]),
        ({"num_to_keep": 2, "score_attribute": "eval/loss"}, [1, 3, 4]),
        ({"num_to_keep": 1, "score_attribute": "eval/loss", "score_order": "max"}, [0, 4]),
        ({"num_to_keep": 2, "score_attribute": "nothing"}, [3, 4]),
    ],
)
def test_the_best_stay_and_the_newest(
    tmp_path: Path, running: Run, config: dict[str, Any], steps: list[int]
) -> None:
    assert kept(tmp_path, running, [5.0, 1.0, None, 2.0, float("nan")], **config) == steps
    best = CheckpointStore(tmp_path, CheckpointConfig(**config)).best()
    assert best is not None
    if config.get("score_attribute") == "eval/loss":
        assert best.step == (0 if config.get("score_order") == "max" else 1)
    else:
        assert best.step == 4


def test_the_newest_is_the_one_begun_last_also_after_going_back(
    tmp_path: Path, running: Run
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        save(store, running, PLAN, step)
    store.close()
    again = CheckpointStore(tmp_path)
    save(again, running, PLAN, 15)
    latest = again.latest()
    assert latest is not None
    assert latest.step == 15
    assert [c.step for c in again.all()] == [20, 15]
    again.close()


def test_steps_go_on_while_it_is_written(
    tmp_path: Path, running: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may be under way; a third is left out or waits, as it is told."""
    gate = threading.Event()
    real = LocalStorage._sync

    def slow(self: LocalStorage, number: int) -> None:
        if threading.current_thread().name == "raypar-checkpoint":
            assert gate.wait(60)
        real(self, number)

    monkeypatch.setattr(LocalStorage, "_sync", slow)
    store = CheckpointStore(tmp_path, CheckpointConfig(num_to_keep=None))
    weights = []
    for step in (0, 1):
        weights.append(running.state_dict())
        assert store.begin(running, TrainState(step=step), PLAN) is not None
        losses(running, step, 1)
    assert store.poll() == []
    assert store.begin(running, TrainState(step=2), PLAN, wait=False) is None
    with pytest.raises(CheckpointError, match=r"not written within 0\.1 s"):
        store.wait(0.1)
    threading.Timer(0.2, gate.set).start()
    third = store.begin(running, TrainState(step=2), PLAN)
    assert third is not None
    assert third.waited_s > 0
    assert third.stall_s >= third.waited_s
    assert [c.step for c in store.wait()] == [0, 1, 2]
    store.close()
    for checkpoint, wanted in zip(store.all(), weights, strict=False):
        found = checkpoint.state_dict()
        assert all(found[key].equal(wanted[key]) for key in wanted)
    assert not weights[0].keys() ^ weights[1].keys()
    assert any(not weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_what_a_closed_run_was_writing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "_sync", lambda *_: None)
    store = CheckpointStore(tmp_path)
    with start("sum_loss", PLAN) as run:
        save(store, run, PLAN, 1)
    gate = threading.Event()
    monkeypatch.setattr("raypar.train.checkpoint.writing._Writing.run", lambda _: gate.wait(60))
    with start("sum_loss", PLAN) as run:
        store.begin(run, TrainState(step=2), PLAN)
    with pytest.raises(CheckpointError, match="the run ended"):
        store.wait()
    gate.set()
    monkeypatch.undo()
    with start("sum_loss", PLAN) as run:
        save(store, run, PLAN, 3)
    assert [c.step for c in store.all()] == [1, 3]
    store.close()
