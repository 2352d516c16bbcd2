"""The server of a rendezvous: it keeps what every rank of a world says until all have said it."""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from raypar.comm._handshake import Door

CONTEXT = b"rendezvous"
LENGTH = struct.Struct("<I")
MOST_REQUEST_BYTES = 16 << 10
"""Of one rank's request: names and addresses."""
MOST_ANSWER_BYTES = 64 << 20
_MOST_RANKS = 1 << 16
_ASK_S = 10.0
LONGEST_WAIT_S = 1e7
_READ_BYTES = 64 << 10

_log = logging.getLogger("raypar.comm")


@dataclass
class _Room:
    """One use of a world's name: who is there, and who waits for the rest."""

    size: int
    infos: dict[int, dict[str, Any]] = field(default_factory=dict)
    members: dict[int, _Member] = field(default_factory=dict)


@dataclass(eq=False)
class _Member:
    """A connection that knows the secret."""

    sock: socket.socket
    rank: int
    until: float
    read: bytearray = field(default_factory=bytearray)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    place: tuple[str, int] | None = None  # world and use, once it has asked
    answered: bool = False


class Meeting:
    """Serves rendezvous on one listening socket, in a thread of its own, until `stop`.

    A rank that asks is counted in; when all of its world are there, all are answered with what all
    said. One whose wait is over, or that hangs up, is counted out again, so that it can come back.
    """

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._door = Door([listener], secret, CONTEXT)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._members: set[_Member] = set()
        self._uses: dict[tuple[str, int], int] = {}
        self._rooms: dict[tuple[str, int], _Room] = {}
        self._thread = threading.Thread(target=self._serve, name="raypar-rendezvous", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and all connections."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)
        self._wake.close()

    def _serve(self) -> None:
        try:
            while True:
                now = time.monotonic()
                wait = min((m.until - now for m in self._members), default=1.0)
                for key, events in self._selector.select(min(1.0, max(0.0, wait))):
                    if key.fileobj is self._woken:
                        return
                    if isinstance(key.data, _Member):
                        self._attend_safely(key.data, events)
                # Also with nothing to read: strangers that say nothing have to go.
                for admitted in self._door.admit(0.0):
                    admitted.sock.setblocking(False)
                    member = _Member(admitted.sock, admitted.rank, time.monotonic() + _ASK_S)
                    self._members.add(member)
                    self._selector.register(member.sock, selectors.EVENT_READ, member)
                self._expire()
        finally:
            for member in self._members:
                member.sock.close()
            self._door.close()
            self._selector.close()
            self._woken.close()

    def _attend_safely(self, member: _Member, events: int) -> None:
        """No member ends the service for the others, whatever it sends."""
        try:
            self._attend(member, events)
        except Exception as error:
            _log.warning("the rendezvous dropped rank %d: %r", member.rank, error)
            if member in self._members:
                self._drop(member)

    def _attend(self, member: _Member, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE and member.unsent:
                member.unsent = member.unsent[member.sock.send(member.unsent) :]
                if not member.unsent:
                    self._drop(member)
                return
            part = member.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part or member.place is not None:
            self._drop(member)  # it hung up, or says more than it was asked
            return
        member.read += part
        if len(member.read) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(member.read)
        if length > MOST_REQUEST_BYTES:
            self._answer(member, {"error": f"a request of {length} bytes is too long"})
        elif len(member.read) >= LENGTH.size + length:
            self._ask(member, bytes(member.read[LENGTH.size : LENGTH.size + length]))

    def _ask(self, member: _Member, text: bytes) -> None:
        try:
            asked = json.loads(text)
            world, size, wait_s, info = (asked[k] for k in ("world", "size", "wait_s", "info"))
            if not (isinstance(world, str) and isinstance(size, int) and isinstance(info, dict)):
                raise TypeError(f"world {world!r:.40}, size {size!r:.40}, info {info!r:.80}")
            if not 0 <= member.rank < size <= _MOST_RANKS or not 0 <= wait_s <= LONGEST_WAIT_S:
                raise ValueError(f"rank {member.rank} of {size}, waiting {wait_s!r:.40} s")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._answer(member, {"error": f"the request cannot be read: {error!r}"})
            return
        use = self._uses.get((world, member.rank), 0) + 1
        room = self._rooms.setdefault((world, use), _Room(size))
        if room.size != size:
            said = f"world {world!r} has {size} ranks to rank {member.rank}, {room.size} to others"
            self._answer(member, {"error": said})
            return
        self._uses[world, member.rank] = use
        member.place = (world, use)
        member.until = time.monotonic() + wait_s
        room.infos[member.rank] = info
        room.members[member.rank] = member
        if len(room.infos) == size:
            del self._rooms[world, use]
            roster = {"ranks": [room.infos[r] for r in range(size)]}
            for one in room.members.values():
                self._answer(one, roster)

    def _answer(self, member: _Member, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        member.answered = True
        member.unsent = memoryview(LENGTH.pack(len(body)) + body)
        member.until = time.monotonic() + _ASK_S  # to take it
        self._selector.modify(member.sock, selectors.EVENT_WRITE, member)

    def _expire(self) -> None:
        now = time.monotonic()
        for member in [m for m in self._members if m.until <= now]:
            room = self._rooms.get(member.place) if member.place is not None else None
            if room is None or member.answered:
                self._drop(member)
                continue
            missing = [r for r in range(room.size) if r not in room.infos]
            self._leave(member)
            self._answer(member, {"missing": missing})

    def _leave(self, member: _Member) -> None:
        """Counts a rank out of a room that is not full yet."""
        room = self._rooms.get(member.place) if member.place is not None else None
        if member.place is None or room is None or room.members.get(member.rank) is not member:
            return
        world, use = member.place
        del room.infos[member.rank], room.members[member.rank]
        self._uses[world, member.rank] = use - 1
        if not room.infos:
            del self._rooms[member.place]

    def _drop(self, member: _Member) -> None:
        self._leave(member)
        self._members.discard(member)
        self._selector.unregister(member.sock)
        member.sock.close()
