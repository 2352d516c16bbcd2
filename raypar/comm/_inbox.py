"""Messages from one source: those that came before they were asked for, and the reverse."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

from raypar.comm._endpoint import readable
from raypar.comm._work import Pending, fits
from raypar.errors import CommAbortedError, CommError

_RECENT = 3


class Inbox:
    """Matches messages and receives of one source by key, first in, first out.

    One thread delivers; any thread posts. Completions run outside the lock, because they may go on
    to send and to post.

    Args:
        aborted: Aborted path → reason; shared by all inboxes of an endpoint, and written before
            `abort` is called.
    """

    def __init__(self, aborted: dict[bytes, str]) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[bytes, deque[Pending]] = {}
        self._ready: dict[bytes, deque[torch.Tensor]] = {}
        self._aborted = aborted
        self._broken: tuple[type[CommError], str] | None = None
        self._claimed: tuple[bytes, Pending] | None = None
        self._recent: deque[tuple[bytes, float]] = deque(maxlen=_RECENT)

    def post(self, key: bytes, pending: Pending) -> None:
        """Hands the next message of `key` to `pending`, now or when it comes."""
        with self._lock:
            message: torch.Tensor | None = None
            failure = self._failure(key) if self._aborted else None
            if failure is None:
                queue = self._ready.get(key)
                if queue is not None:
                    message = queue.popleft()
                    if not queue:
                        del self._ready[key]
                elif self._broken is not None:
                    failure = self._broken
                else:
                    waiting = self._waiting.get(key)
                    if waiting is None:
                        self._waiting[key] = deque((pending,))
                    else:
                        waiting.append(pending)
        if message is not None:
            self._hand(key, message, pending)
        elif failure is not None:
            pending.fail(*failure)

    def claim(
        self, key: bytes, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Pending | None, bool]:
        """The receive that the message about to be read is for, where that decides how.

        Returns:
            The receive, and whether the message has the form that it wants. None if there is none
            yet, or if it takes the message but brings no buffer for it.
        """
        with self._lock:
            waiting = self._waiting.get(key)
            form = waiting[0].form if waiting else None
            if waiting is None or form is None:
                return None, True
            right = form.dtype == dtype and form.shape == shape
            if right and waiting[0].into is None:
                return None, True
            pending = self._pop(key, waiting)
            self._claimed = (key, pending)
            return pending, right

    def refuse(self, key: bytes, pending: Pending, outline: torch.Tensor) -> None:
        """Ends a claimed receive with the outline of a message that it does not take.

        Args:
            key: The message's key.
            pending: The receive.
            outline: A meta tensor: shape and dtype of what came, without its memory.
        """
        with self._lock:
            self._recent.append((key, time.monotonic()))
            self._claimed = None
            aborted = self._failure(key) is not None
        if not pending.complete(outline) and not aborted:
            # Its deadline won the race; a later receive must not get what has no values.
            self.break_off(
                CommError, f"a message for {readable(key)} had another form than was expected"
            )

    def deliver(self, key: bytes, tensor: torch.Tensor, claimed: Pending | None = None) -> None:
        """Gives a whole message to the receive it belongs to, or keeps it."""
        with self._lock:
            self._recent.append((key, time.monotonic()))
            self._claimed = None
            pending = claimed
            if pending is None and not (self._aborted and self._failure(key)):
                waiting = self._waiting.get(key)
                if waiting:
                    pending = self._pop(key, waiting)
                else:
                    self._ready.setdefault(key, deque()).append(tensor)
        if pending is not None:
            self._hand(key, tensor, pending)

    def _hand(self, key: bytes, tensor: torch.Tensor, pending: Pending) -> None:
        into = pending.into
        if into is not None and into is not tensor and fits(tensor, into):
            into.copy_(tensor)
            tensor = into
        if not pending.complete(tensor) and into is None:
            with self._lock:  # its deadline won the race: the message belongs to the next receive
                self._ready.setdefault(key, deque()).appendleft(tensor)

    def _pop(self, key: bytes, waiting: deque[Pending]) -> Pending:
        pending = waiting.popleft()
        if not waiting:
            del self._waiting[key]
        return pending

    def forget(self, key: bytes, pending: Pending) -> None:
        """Takes a posted receive back."""
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None and pending in waiting:
                waiting.remove(pending)
                if not waiting:
                    del self._waiting[key]

    def abort(self, path: bytes, reason: str) -> None:
        """Fails every receive under `path` and drops its messages."""
        with self._lock:
            for key in [k for k in self._ready if k.startswith(path)]:
                del self._ready[key]
            failed = self._take_waiting(path)
        for pending in failed:
            pending.fail(CommAbortedError, reason)

    def break_off(self, kind: type[CommError], reason: str) -> None:
        """The source is gone: fails what waits, now and later; what came stays readable."""
        with self._lock:
            if self._broken is None:
                self._broken = (kind, reason)
            failed = self._take_waiting(b"/")
        for pending in failed:
            pending.fail(kind, reason)

    def _take_waiting(self, path: bytes) -> list[Pending]:
        keys = [key for key in self._waiting if key.startswith(path)]
        failed = [pending for key in keys for pending in self._waiting.pop(key)]
        if self._claimed is not None and self._claimed[0].startswith(path):
            failed.append(self._claimed[1])
        return failed

    def _failure(self, key: bytes) -> tuple[type[CommError], str] | None:
        for path, reason in self._aborted.items():
            if key.startswith(path):
                return (CommAbortedError, reason)
        return None

    @property
    def broken(self) -> tuple[type[CommError], str] | None:
        """Why the source is gone, or None."""
        return self._broken

    def arrived(self) -> str:
        """A clause about the last messages, and those that nobody has asked for."""
        now = time.monotonic()
        with self._lock:
            recent = [f"{readable(key)} {now - at:.1f} s ago" for key, at in self._recent]
            unread = sorted(readable(key) for key in self._ready)
        text = "from it came lately: " + ", ".join(recent) if recent else "nothing came from it yet"
        if unread:
            more = f" and {len(unread) - _RECENT} more" if len(unread) > _RECENT else ""
            text += f"; not asked for yet: {', '.join(unread[:_RECENT])}{more}"
        return text


def aborted_reason(aborted: dict[bytes, str], path: bytes) -> str | None:
    """Why `path`, or a group it is part of, was aborted; None if it was not."""
    if aborted:
        for known, reason in list(aborted.items()):
            if path.startswith(known):
                return reason
    return None
