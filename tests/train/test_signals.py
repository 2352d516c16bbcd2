"""Signals while a run is under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest
from torch.utils.data import DataLoader

from raypar.train.data.workers import worker_died
from raypar.train.signals import terminating


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_second_interrupt_does_not_cut_the_cleaning_up(
    capfd: pytest.CaptureFixture[str],
) -> None:
    cleaned = False

    def interrupted_twice() -> None:
        nonlocal cleaned
        with terminating():
            try:
                send(signal.SIGINT)
            finally:
                send(signal.SIGINT)
                send(signal.SIGTERM)
                cleaned = True

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert cleaned
    assert capfd.readouterr().err.count("being released") == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_that_a_sweep_leaves_behind_does_not_take_ctrl_c() -> None:
    swallowed = []

    def signal_interrupt_tune_run(number: int, frame: object) -> None:
        swallowed.append(number)

    signal_interrupt_tune_run.__module__ = "ray.tune.tune"
    before = signal.signal(signal.SIGINT, signal_interrupt_tune_run)

    def interrupted() -> None:
        with terminating():
            send(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert signal.getsignal(signal.SIGINT) is signal_interrupt_tune_run
    finally:
        signal.signal(signal.SIGINT, before)
    assert not swallowed


def test_a_loaders_process_that_dies_raises_where_it_is_read_and_nowhere_else() -> None:
    samples: Any = range(64)
    loader: DataLoader[Any] = DataLoader(samples, num_workers=1, batch_size=1)
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    with terminating():
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        signal.raise_signal(signal.SIGCHLD)  # were it not here yet, it is now
        with pytest.raises(RuntimeError) as error:
            list(iterator)
    assert worker_died(error.value)
    assert not worker_died(RuntimeError("another one"))


def test_a_users_own_handler_of_children_goes_on() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: seen.append(number))
    try:
        with terminating():
            send(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert seen == [signal.SIGCHLD]


def test_who_insists_gets_out() -> None:
    cleaned = False

    def insist() -> None:
        nonlocal cleaned
        with terminating():
            try:
                send(signal.SIGINT)
            finally:
                for _ in range(3):
                    send(signal.SIGINT)
                cleaned = True

    with pytest.raises(KeyboardInterrupt):
        insist()
    assert not cleaned


def test_sigterm_ends_with_143_also_after_its_handler_was_replaced() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def replaced() -> None:
        with terminating() as signals:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
            signals.take()
            send(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        replaced()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_of_the_user_gets_the_signal() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))

    def terminated() -> None:
        with terminating():
            send(signal.SIGTERM)

    try:
        with pytest.raises(SystemExit):
            terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_first_signal_may_be_taken_softly_and_the_second_is_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    told: list[BaseException] = []

    def twice() -> None:
        with terminating() as signals, signals.softly(told.append):
            send(signal.SIGINT)
            assert [type(error) for error in told] == [KeyboardInterrupt]
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert len(told) == 1
    assert "with a checkpoint" in capfd.readouterr().err
