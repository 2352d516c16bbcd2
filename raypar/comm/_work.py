"""A transfer under way: completed or failed by any thread, waited for by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from raypar.comm.group import TensorSpec, Work
from raypar.errors import CommError, CommTimeoutError


class PeerClosedError(CommError):
    """A peer said goodbye: it is gone, but nothing is wrong with it."""


class Pending(Work):
    """A call that other threads complete.

    A raw lock is the gate between the thread that completes and the one that waits: it is the
    cheapest wake-up that CPython has, and it holds no GIL while it waits.

    Args:
        call: Says which call this is ("stage 1 rank 0: recv 'x' from rank 1"); called for errors.
        timeout_s: Seconds that `wait` blocks at most, counted from the call of `wait`.
        into: A contiguous tensor that a receive fills in place, if it fits.
        then: Called by the completing thread, once, before a waiter wakes; for chained transfers.
        evidence: Says what is known about the peer; called for the text of a timeout.
        on_timeout: Called when the deadline passed, so that the transport forgets this call.
    """

    __slots__ = (
        "_call", "_error", "_evidence", "_gate", "_on_timeout", "_once", "_then", "_timeout_s",
        "_value", "finished", "into",
    )  # fmt: skip

    def __init__(
        self,
        call: Callable[[], str],
        timeout_s: float,
        *,
        into: torch.Tensor | None = None,
        then: Callable[[Pending], None] | None = None,
        evidence: Callable[[], str] | None = None,
        on_timeout: Callable[[Pending], None] | None = None,
    ) -> None:
        self._call = call
        self._timeout_s = max(0.0, timeout_s)
        self.into = into
        self._then = then
        self._evidence = evidence
        self._on_timeout = on_timeout
        self._gate = threading.Lock()
        self._gate.acquire()
        self._once = threading.Lock()
        self._value: torch.Tensor | None = None
        self._error: tuple[type[CommError], str] | None = None
        self.finished = False

    def complete(self, value: torch.Tensor | None = None) -> bool:
        """Marks the call as done; False if it had already ended."""
        if not self._once.acquire(blocking=False):
            return False
        self._value = value
        self._end()
        return True

    def fail(self, kind: type[CommError], reason: str) -> None:
        """Makes `wait` raise ``kind("<call>: <reason>")``; a no-op if the call already ended."""
        if self._once.acquire(blocking=False):
            self._error = (kind, reason)
            self._end()

    def _end(self) -> None:
        if self._then is not None:
            self._then(self)
        self.finished = True
        self._gate.release()

    @property
    def form(self) -> TensorSpec | torch.Tensor | None:
        """What a message must look like, where that is known beforehand."""
        return self.into

    @property
    def error(self) -> tuple[type[CommError], str] | None:
        """Kind and reason of the failure, if it failed."""
        return self._error

    @property
    def value(self) -> torch.Tensor | None:
        """What `complete` was given."""
        return self._value

    def wait(self) -> torch.Tensor | None:
        if not self.finished:
            began = time.monotonic()
            if not self._gate.acquire(timeout=min(self._timeout_s, threading.TIMEOUT_MAX)):
                self._expire(time.monotonic() - began)
            else:
                self._gate.release()
        if self._error is not None:
            kind, reason = self._error
            raise kind(f"{self._call()}: {reason}")
        return self._checked(self._value)

    def _checked(self, value: torch.Tensor | None) -> torch.Tensor | None:
        return value

    def _expire(self, waited: float) -> None:
        evidence = self._evidence() if self._evidence is not None else ""
        self.fail(
            CommTimeoutError,
            f"waited {waited:.1f} s{'; ' + evidence if evidence else ''}. If the peer is only "
            f"slow, raise timeout_s (now {self._timeout_s:g}), for example to "
            f"{4 * self._timeout_s:g}",
        )
        if self._on_timeout is not None:
            self._on_timeout(self)

    def done(self) -> bool:
        return self.finished


class PendingReceive(Pending):
    """A receive that checks the form of what came."""

    __slots__ = ("_spec",)

    def __init__(
        self,
        spec: TensorSpec,
        call: Callable[[], str],
        timeout_s: float,
        *,
        evidence: Callable[[], str] | None = None,
        on_timeout: Callable[[Pending], None] | None = None,
    ) -> None:
        super().__init__(call, timeout_s, evidence=evidence, on_timeout=on_timeout)
        self._spec = spec

    @property
    def form(self) -> TensorSpec | torch.Tensor | None:
        return self._spec

    def _checked(self, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is not None and not fits(value, self._spec):
            raise CommError(f"{self._call()}: {misfit(value, self._spec)}")
        return value


def fits(tensor: torch.Tensor, form: TensorSpec | torch.Tensor) -> bool:
    """Whether `tensor` has the shape and dtype of `form`."""
    return tensor.dtype == form.dtype and tuple(tensor.shape) == tuple(form.shape)


def misfit(tensor: torch.Tensor, spec: TensorSpec | torch.Tensor) -> str:
    """One clause about how the two differ."""
    return (
        f"expected shape {tuple(spec.shape)} {spec.dtype}, but the message has shape "
        f"{tuple(tensor.shape)} {tensor.dtype}: sender and receiver disagree on what crosses here"
    )
