"""One run at a time in a folder."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from raypar.errors import ConfigError
from raypar.train._run_lock import locked


def _hold(folder: str, ready: threading.Event) -> None:
    with locked(Path(folder)):
        ready.set()
        time.sleep(600)


def test_a_second_run_is_told_who_trains_there(tmp_path: Path) -> None:
    with locked(tmp_path):
        for _ in range(2):
            with (
                pytest.raises(ConfigError, match=r"is under way: this process \(\d+\) .*-2'"),
                locked(tmp_path, patience_s=0),
            ):
                pass
    with locked(tmp_path, patience_s=0):
        pass


def test_a_run_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    done = threading.Event()

    def end() -> None:
        with locked(tmp_path):
            done.wait(5)

    other = threading.Thread(target=end)
    other.start()
    while not (tmp_path / ".lock").exists():
        time.sleep(0.001)
    threading.Timer(0.2, done.set).start()
    with locked(tmp_path, patience_s=60):
        assert done.is_set() or not other.is_alive()
    other.join()


def test_a_killed_run_holds_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(ConfigError, match=rf"process {process.pid} on"), locked(tmp_path, 0):
        pass
    process.kill()
    process.join()
    with locked(tmp_path, patience_s=10):
        pass


def test_what_a_run_has_forked_does_not_hold_its_lock(tmp_path: Path) -> None:
    """As the workers of a DataLoader, which live as long as the loader does."""
    context = multiprocessing.get_context("fork")
    done, held = context.Event(), context.Event()

    def look() -> None:
        done.wait(60)
        with locked(tmp_path, patience_s=0):
            held.set()

    with locked(tmp_path):
        worker = context.Process(target=look)
        worker.start()
    with locked(tmp_path, patience_s=0):
        pass
    done.set()
    worker.join(60)
    assert held.is_set()
