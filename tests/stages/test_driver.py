"""The driver actor's own code, on actors that answer at once. Starts no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raypar.stages.actor import Built
from raypar.stages.driver import Driver
from raypar.stages.worker import _Gate


class Remote:
    """A method of an actor that has answered when it was called."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Rank:
    def __init__(self) -> None:
        self.gate = _Gate()
        self.hold = Remote(self.gate.hold)
        self.end_at = Remote(self.gate.end_at)
        self.call = Remote(self.calls)

    def calls(self, method: str, args: tuple[Any, ...]) -> None:
        assert (method, args) == ("go_on", ())
        self.gate.end_at(None)


def test_a_stop_while_ranks_are_let_go_is_heard_by_all_or_by_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raypar.stages.driver.ray.get", lambda answers, timeout=None: answers)
    settings: Any = None
    driver = Driver([], settings)
    first, last = Rank(), Rank()
    driver._actors = [first, last]
    driver.request_stop()  # of the steps before these
    stop = threading.Thread(target=driver.request_stop)

    def late(method: str, args: tuple[Any, ...]) -> None:
        stop.start()
        stop.join(0.3)  # between the first rank and the last, if it can be
        last.calls(method, args)

    monkeypatch.setattr(last.call, "remote", late)

    def drive(*_: int) -> None:
        stop.join()

    monkeypatch.setattr(driver, "_drive", drive)
    driver.train(0, 5, 5)
    assert first.gate.admits(0) == last.gate.admits(0)
    assert driver._stop.is_set(), "the steps under way are to end"


def test_a_rank_that_is_not_built_in_time_is_named_with_the_key_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [[(None, 0, Built({}, None))]]
    calls: Any = SimpleNamespace(ready=lambda: answers.pop() if answers else time.sleep(0.01) or [])
    settings: Any = SimpleNamespace(build_timeout_s=0.2)
    driver = Driver([], settings)
    driver._actors = [None, None]
    monkeypatch.setattr(driver, "_fail", lambda calls, failures, rows: failures)
    built, failures = driver._await_setup(calls)
    assert list(built) == [0]
    assert isinstance(failures, list)
    (failure,) = failures
    assert "of 2 ranks [1] did not build their parts of the model within 0.2 s" in failure.message
    assert "mesh.start_timeout_s, for example to 0.6" in failure.message
