"""Signals while a run is under way."""

from __future__ import annotations

import os
import signal

import pytest

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
