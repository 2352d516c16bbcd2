"""NCCL and CUDA without either: what `NcclGroup` asks of them, for tensors on the CPU.

Ranks are threads of one process. A kernel is a call put into its stream's queue, which a thread of
the stream works off; it waits for its peers there, as a kernel spins on the device. So what the
host sees is what it sees of NCCL: calls return at once, an event is done when its kernel is, a
collective that a rank does not join never ends, until the communicator is aborted.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

from raypar.comm import _nccl_api, nccl

_DTYPES = {code: dtype for dtype, code in _nccl_api._TYPES.items()}


class Aborted(Exception):
    """A kernel ends, because its communicator was aborted."""


def _memory(pointer: int, count: int, kind: int) -> torch.Tensor:
    dtype = _DTYPES[kind]
    nbytes = count * dtype.itemsize
    block = (ctypes.c_char * nbytes).from_address(pointer)
    return torch.frombuffer(block, dtype=dtype)


class Stream:
    """Works off its kernels in order, on a thread of its own."""

    numbers = itertools.count(1)
    known: ClassVar[dict[int, Stream]] = {}

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = next(Stream.numbers)
        Stream.known[self.cuda_stream] = self
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._left = 0
        self._done = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def put(self, kernel: Callable[[], None]) -> None:
        with self._done:
            self._left += 1
        self._work.put(kernel)

    def _serve(self) -> None:
        while True:
            kernel = self._work.get()
            with contextlib.suppress(Aborted):
                kernel()
            with self._done:
                self._left -= 1
                self._done.notify_all()

    def query(self) -> bool:
        with self._done:
            return self._left == 0

    def synchronize(self) -> None:
        with self._done:
            self._done.wait_for(lambda: self._left == 0, 60)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event: Event) -> None:
        self.put(event.reached.wait)


class Event:
    def __init__(self, **_: Any) -> None:
        self.reached = threading.Event()

    def record(self, stream: Stream) -> None:
        stream.put(self.reached.set)

    def query(self) -> bool:
        return self.reached.is_set()


class Meeting:
    """What the ranks of one communicator share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.calls: dict[int, dict[int, Any]] = {}
        self.mail: dict[tuple[int, int], deque[torch.Tensor]] = {}


class Library:
    """The module `cupy.cuda.nccl`, of one process of ranks.

    Attributes:
        slow_abort: Aborting a communicator returns once no other kernel runs on the device, as
            freeing device memory does.
        stuck: Whether an abort waited for a kernel that nobody ended.
        errors: What `check_async_error` raises, by communicator.
    """

    available = True

    def __init__(self) -> None:
        self.meetings: dict[tuple[int, ...], Meeting] = {}
        self.lock = threading.Lock()
        self.ids = itertools.count(1)
        self.made: list[Communicator] = []
        self.slow_abort = self.stuck = False
        self.group_calls = 0
        self.errors: dict[Communicator, Exception] = {}

    def get_unique_id(self) -> tuple[int, ...]:
        number = next(self.ids)
        return (number % 128, number // 128, *([0] * 126))

    def groupStart(self) -> None:  # noqa: N802 (cupy's name)
        self.group_calls += 1

    def groupEnd(self) -> None:  # noqa: N802
        pass

    def NcclCommunicator(self, size: int, ident: tuple[int, ...], rank: int) -> Communicator:  # noqa: N802
        with self.lock:
            meeting = self.meetings.setdefault(ident, Meeting(size))
            self.made.append(Communicator(self, meeting, rank))
            return self.made[-1]


class Communicator:
    """One rank's end."""

    def __init__(self, library: Library, meeting: Meeting, rank: int) -> None:
        self._library, self._meeting, self._rank = library, meeting, rank
        self._calls = 0
        self.gone = threading.Event()
        self.busy = 0

    # -- kernels --

    def _launch(self, stream: int, body: Callable[[], None]) -> None:
        def kernel() -> None:
            with self._meeting.changed:
                self.busy += 1
            try:
                body()
            finally:
                with self._meeting.changed:
                    self.busy -= 1
                    self._meeting.changed.notify_all()

        Stream.known[stream].put(kernel)

    def _until(self, ready: Callable[[], bool]) -> None:
        with self._meeting.changed:
            while not ready():
                if self.gone.is_set():
                    raise Aborted
                self._meeting.changed.wait(0.02)

    def _collective(
        self, stream: int, mine: Callable[[], Any], finish: Callable[[Any], object]
    ) -> None:
        number, self._calls = self._calls, self._calls + 1
        meeting = self._meeting

        def body() -> None:
            with meeting.changed:
                meeting.calls.setdefault(number, {})[self._rank] = mine()
                meeting.changed.notify_all()
            self._until(lambda: len(meeting.calls[number]) == meeting.size)
            finish([meeting.calls[number][r] for r in range(meeting.size)])

        self._launch(stream, body)

    def _reduced(self, parts: list[torch.Tensor], op: int) -> torch.Tensor:
        total = parts[0].clone()
        for part in parts[1:]:
            total = {0: torch.add, 2: torch.maximum, 3: torch.minimum}[op](total, part)
        return total

    def allReduce(self, a: int, b: int, n: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        out = _memory(b, n, kind)
        source = _memory(a, n, kind)
        self._collective(stream, source.clone, lambda parts: out.copy_(self._reduced(parts, op)))

    def allGather(self, a: int, b: int, n: int, kind: int, stream: int) -> None:  # noqa: N802
        out = _memory(b, n * self._meeting.size, kind)
        self._collective(
            stream, _memory(a, n, kind).clone, lambda parts: out.copy_(torch.cat(parts))
        )

    def reduceScatter(self, a: int, b: int, n: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        out = _memory(b, n, kind)
        at = slice(self._rank * n, (self._rank + 1) * n)
        self._collective(
            stream,
            _memory(a, n * self._meeting.size, kind).clone,
            lambda parts: out.copy_(self._reduced([p[at] for p in parts], op)),
        )

    def bcast(self, a: int, n: int, kind: int, root: int, stream: int) -> None:
        whole = _memory(a, n, kind)
        self._collective(stream, whole.clone, lambda parts: whole.copy_(parts[root]))

    def send(self, a: int, n: int, kind: int, peer: int, stream: int) -> None:
        whole, meeting, way = _memory(a, n, kind), self._meeting, (self._rank, peer)

        def body() -> None:
            with meeting.changed:
                meeting.mail.setdefault(way, deque()).append(whole.clone())
                meeting.changed.notify_all()

        self._launch(stream, body)

    def recv(self, a: int, n: int, kind: int, peer: int, stream: int) -> None:
        whole, meeting, way = _memory(a, n, kind), self._meeting, (peer, self._rank)

        def body() -> None:
            self._until(lambda: bool(meeting.mail.get(way)))
            whole.copy_(meeting.mail[way].popleft())

        self._launch(stream, body)

    # -- life --

    def check_async_error(self) -> None:
        error = self._library.errors.get(self)
        if error is not None:
            raise error

    def abort(self) -> None:
        self.gone.set()
        with self._meeting.changed:
            self._meeting.changed.notify_all()
        if self._library.slow_abort:
            # Freeing device memory waits for all kernels of the rank's device.
            mine = [c for c in self._library.made if c._rank == self._rank]
            end = time.monotonic() + 10
            while any(c.busy for c in mine):
                if time.monotonic() > end:
                    self._library.stuck = True
                    return
                time.sleep(0.01)

    destroy = abort


class HostStream:
    """The current stream of code that computes on the host: what waits there blocks the host."""

    def wait_event(self, event: Event) -> None:
        event.reached.wait(60)


class SideStream(Stream):
    """What `torch.cuda.Stream` makes; the host's own work is done when it is told of it."""

    def wait_stream(self, other: Any) -> None:
        if not isinstance(other, HostStream):
            super().wait_stream(other)


@contextlib.contextmanager
def installed() -> Iterator[Library]:
    """While open, `NcclGroup` works on CPU tensors with a library of its own."""
    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", SideStream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: HostStream())
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(_nccl_api, "load", lambda: library)
        yield library


def group_of(control: Any) -> nccl.NcclGroup:
    """A rank's group over its control group (of a `LocalWorld`)."""
    return nccl.NcclGroup(control, torch.device("cpu"))
