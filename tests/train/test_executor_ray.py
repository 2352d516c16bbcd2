"""Functions as Ray tasks, through the interface of `concurrent.futures`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait

import pytest
import ray

from raypar.errors import ConfigError, PlanError
from raypar.train.executor import RayExecutor
from tests.train import test_executor_ray


@pytest.fixture(autouse=True)
def _by_value(ray_session: str) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(test_executor_ray)
    yield
    ray.cloudpickle.unregister_pickle_by_value(test_executor_ray)


class Counter:
    """Remembers how often it was asked, in the process where that was."""

    def __init__(self, start: int) -> None:
        self.asked = start

    def ask(self, by: int = 1) -> int:
        self.asked += by
        return self.asked


class UntravellingError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("no way")
        self.lock = threading.Lock()


def refuse(value: int) -> int:
    raise PlanError(f"no plan for {value}")


def untravelling() -> None:
    raise UntravellingError


def work_for_a_minute() -> None:
    """Ray interrupts Python code between two of its lines, not a wait in one of them."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)


def length(values: list[int]) -> int:
    return len(values)


def test_results_errors_and_shared_values() -> None:
    with RayExecutor(max_workers=2) as executor:
        assert list(executor.map(len, [[1], [1, 2], []])) == [1, 2, 0]
        many = executor.share(list(range(1000)))
        assert executor.submit(length, many).result() == 1000
        assert executor.submit(length, values=many).result() == 1000
        error = executor.submit(refuse, 7).exception()
        assert type(error) is PlanError
        assert str(error) == "no plan for 7"
        with pytest.raises(Exception, match="UntravellingError: no way"):
            executor.submit(untravelling).result()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(len, [])
    with pytest.raises(ConfigError, match="max_workers is 0"):
        RayExecutor(max_workers=0)


def test_an_object_is_kept_by_the_worker_and_at_most_so_many_tasks_are_under_way() -> None:
    counter = Counter(10)
    with RayExecutor(max_workers=1) as executor:
        asked = [executor.submit(counter.ask, by=2) for _ in range(3)]
        assert executor.width == 1
        found = [f.result() for f in asked]
    # One worker after the other runs them: mostly the same one, whose counter goes on.
    assert set(found) <= {12, 14, 16}
    assert found[0] == 12
    assert counter.asked == 10


def test_what_waits_is_dropped_and_what_runs_is_interrupted() -> None:
    executor = RayExecutor(max_workers=1)
    running: Future[None] = executor.submit(work_for_a_minute)
    waiting: Future[int] = executor.submit(len, [])
    executor.shutdown(cancel_futures=True)
    assert not wait([running], timeout=30).not_done
    assert not wait([waiting], timeout=30).not_done
    assert waiting.cancelled()
    with pytest.raises(CancelledError):
        running.result()
