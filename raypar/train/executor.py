"""`concurrent.futures` on Ray tasks: work that imports no Ray runs side by side on a cluster."""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, TaskCancelledError

from raypar.errors import ClusterError, ConfigError, RayparError, TrainingError
from raypar.stages.faults import cause_of

_T = TypeVar("_T")
_LOOK_S = 0.05
_AGAIN_S = 1.0
"""Seconds after which work that was to be interrupted, and goes on, is interrupted again."""
_KEPT = 8  # shared values that a worker, and functions that an executor, keeps


@dataclass(frozen=True)
class Shared:
    """A value that is sent to every worker once; see `RayExecutor.share`."""

    key: str
    ref: Any


@dataclass
class _Work:
    future: Future[Any]
    function: Shared
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class RayExecutor(Executor):
    """Runs functions as Ray tasks.

    A function is sent to a worker process the first time that it runs there, and kept: what a
    bound method's object remembers from one call helps the next one in the same process, and
    nobody else. Errors are raised as the function raised them.

    Args:
        max_workers: Most tasks under way; default: as many as the cluster has room for.
        num_cpus: CPUs that each task reserves; 0 where others, that are idle meanwhile, hold them.

    Raises:
        ClusterError: This process is not connected to Ray, or no task would ever fit.
        ConfigError: `max_workers` is less than 1.
    """

    def __init__(self, max_workers: int | None = None, *, num_cpus: float = 1.0) -> None:
        if max_workers is not None and max_workers < 1:
            raise ConfigError(f"max_workers is {max_workers}; give a number of at least 1")
        if not ray.is_initialized():
            raise ClusterError(
                "this process is not connected to Ray: call ray.init() or "
                "raypar.train.session.connect(address) first"
            )
        cpus = float(ray.cluster_resources().get("CPU", 0.0))
        if num_cpus > cpus:
            raise ClusterError(
                f"a task wants {num_cpus:g} CPUs, the cluster has {cpus:g}: set num_cpus={cpus:g} "
                "or less, or add nodes"
            )
        self.width = max_workers or max(1, int(cpus / num_cpus if num_cpus else cpus))
        self._task = ray.remote(num_cpus=num_cpus)(_call)
        self._functions: OrderedDict[Any, tuple[Any, Shared]] = OrderedDict()
        self._waiting: deque[_Work] = deque()
        self._under_way: dict[Any, Future[Any]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._interrupt_at = float("inf")
        self._thread = threading.Thread(target=self._serve, name="raypar tasks", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Queues ``fn(*args, **kwargs)``; arguments that are `Shared` arrive as their values.

        Raises:
            RuntimeError: The executor is shut down (as `concurrent.futures` has it).
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future: Future[_T] = Future()
            self._waiting.append(_Work(future, self._function(fn), args, kwargs))
            self._start_waiting()
            self._changed.notify_all()
        return future

    def share(self, value: Any) -> Shared:
        """Sends a large value to every worker only once: give the answer to `submit` instead."""
        return Shared(secrets.token_hex(8), ray.put(value))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more work; see `concurrent.futures.Executor.shutdown`.

        Args:
            wait: Whether to wait for the work that was taken.
            cancel_futures: Work that waits is dropped, and work under way is interrupted.
        """
        with self._changed:
            self._closed = True
            if cancel_futures:
                while self._waiting:
                    future = self._waiting.popleft().future
                    future.cancel()
                    future.set_running_or_notify_cancel()  # who waits for it must hear of it
                self._interrupt()
            self._changed.notify_all()
        if wait:
            self._thread.join()

    def _interrupt(self) -> None:
        """Interrupts what is under way, and once more later: Ray may lose one on its way there."""
        for ref in self._under_way:
            ray.cancel(ref)
        self._interrupt_at = time.monotonic() + _AGAIN_S

    def _function(self, fn: Callable[..., Any]) -> Shared:
        """The function as a shared value; equal ones (bound methods of one object) are one."""
        try:
            hash(fn)
            key: Any = fn
        except TypeError:
            key = id(fn)
        known = self._functions.get(key)
        if known is None:
            known = self._functions[key] = (fn, self.share(fn))  # held: an id is not given again
            while len(self._functions) > _KEPT:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        return known[1]

    def _start_waiting(self) -> None:
        while self._waiting and len(self._under_way) < self.width:
            work = self._waiting.popleft()
            if not work.future.set_running_or_notify_cancel():
                continue
            try:
                ref = self._task.remote([work.function], list(work.arguments), work.named)
            except Exception as error:  # arguments that cannot travel
                work.future.set_exception(error)
            else:
                self._under_way[ref] = work.future

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._under_way:
                    if self._closed and not self._waiting:
                        return
                    self._changed.wait()
                refs = list(self._under_way)
            done = self._finished(refs)
            with self._changed:
                futures = {ref: self._under_way.pop(ref) for ref in done}
                self._start_waiting()
                if time.monotonic() > self._interrupt_at:
                    self._interrupt()
            for ref, future in futures.items():
                _settle(future, ref)

    @staticmethod
    def _finished(refs: list[Any]) -> list[Any]:
        try:
            return list(ray.wait(refs, num_returns=1, timeout=_LOOK_S)[0])
        except Exception:  # Ray was shut down: every one of them now raises
            return refs


def _settle(future: Future[Any], ref: Any) -> None:
    """Passes on what a task came to."""
    try:
        good, value = ray.get(ref)
    except TaskCancelledError:
        future.set_exception(CancelledError())
    except Exception as error:
        name, message = cause_of(str(error)) if isinstance(error, RayError) else (None, str(error))
        text = f"{name}: {message}" if name else message
        lost = TrainingError(f"a task was lost: {text}")
        lost.__cause__ = error
        future.set_exception(lost)
    else:
        if good:
            future.set_result(value)
        else:
            future.set_exception(value)


_HELD: OrderedDict[str, Any] = OrderedDict()
"""In a worker process: shared values that have arrived."""


def _value_of(shared: Shared) -> Any:
    if shared.key not in _HELD:
        _HELD[shared.key] = ray.get(shared.ref)
        while len(_HELD) > _KEPT:
            _HELD.popitem(last=False)
    _HELD.move_to_end(shared.key)
    return _HELD[shared.key]


def _call(function: list[Shared], arguments: list[Any], named: dict[str, Any]) -> tuple[bool, Any]:
    """In a worker: the result, or the error as a value, since Ray would change its class."""
    try:
        given = [_value_of(a) if isinstance(a, Shared) else a for a in arguments]
        by_name = {k: _value_of(a) if isinstance(a, Shared) else a for k, a in named.items()}
        return True, _value_of(function[0])(*given, **by_name)
    except KeyboardInterrupt:  # Ray's way to cancel
        raise
    except BaseException as error:
        return False, _portable(error)


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # it holds what cannot travel, or takes other arguments than it has kept
        return RayparError(f"{type(error).__name__}: {error}")
    return error
