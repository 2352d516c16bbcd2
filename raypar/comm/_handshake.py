"""How two ends of a new connection show each other that they know the run's secret.

Challenge and response with HMAC-SHA256 (RFC 2104; the form of mutual authentication is that of
ISO/IEC 9798-4): each end sends 32 random bytes, and proves the secret over both. The secret itself
never travels here, a recorded exchange is of no use, and nothing of variable length is read before
the proof was right. Traffic after it is neither signed nor encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from raypar.errors import CommError

_MAGIC = b"raypar/1"
_NONCE = 32
_HELLO = struct.Struct(f"<8s{_NONCE}s")
_CLAIM = struct.Struct(f"<{_NONCE}sI32s")
"""The dialling end's nonce, the rank that it says it is, its proof."""
_PROOF = 32
_REFUSED = bytes(_PROOF)
_PATIENCE_S = 5.0
_MOST_STRANGERS = 128
_MOST_LINES = 20

_log = logging.getLogger("raypar.comm")


class DroppedError(CommError):
    """The other end went away before the exchange was over; dialling again may help."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A connection whose other end knows the secret.

    Attributes:
        sock: Connected, blocking.
        rank: The rank that it says it is.
    """

    sock: socket.socket
    rank: int


def introduce(
    sock: socket.socket, secret: bytes, context: bytes, rank: int, deadline: float
) -> None:
    """The dialling end's part, on a connected socket.

    Args:
        sock: Connected.
        secret: What both ends know.
        context: What the connection is for; equal at both ends.
        rank: The rank to say.
        deadline: `time.monotonic` at which to give up.

    Raises:
        DroppedError: The other end went away, or did not answer in time.
        CommError: It speaks something else, or the two do not know the same secret.
    """
    hello = _read(sock, _HELLO.size, deadline)
    magic, theirs = _HELLO.unpack(hello)
    if magic != _MAGIC:
        raise CommError(f"what listens there is no rank of this raypar (it says {magic!r})")
    ours = secrets.token_bytes(_NONCE)
    said = context + theirs + ours + struct.pack("<I", rank)
    try:
        sock.sendall(_CLAIM.pack(ours, rank, _prove(secret, b"dials", said)))
    except OSError as error:
        raise DroppedError(f"it hung up ({error})") from None
    proof = _read(sock, _PROOF, deadline)
    if hmac.compare_digest(proof, _REFUSED):
        raise CommError("it refused this rank: the two do not know the same token")
    if not hmac.compare_digest(proof, _prove(secret, b"listens", said)):
        raise CommError("what listens there does not know the run's token")


def _prove(secret: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + b"\0" + said, "sha256")


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = sock.recv(count - len(data))
        except OSError as error:
            raise DroppedError(f"it did not answer ({error})") from None
        if not part:
            raise DroppedError("it hung up")
        data += part
    return data


@dataclass
class _Stranger:
    """A connection that has not shown yet that it knows the secret."""

    sock: socket.socket
    where: str
    nonce: bytes
    until: float
    read: bytearray = field(default_factory=bytearray)


class Door:
    """The listening end: greets any number of connections side by side, in one thread.

    A connection that says something wrong, hangs up, or has not proved the secret after 5 s is
    dropped with one line in the log (`raypar.comm`). None can hold up another, and at most 128 are
    kept: after that the oldest goes.

    Args:
        listeners: Listening sockets; the door owns them.
        secret: What both ends know.
        context: What the connections are for.
        patience_s: Seconds that a connection has to prove itself.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        secret: bytes,
        context: bytes,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._secret, self._context, self._patience_s = secret, context, patience_s
        self._listeners = list(listeners)
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._told: set[tuple[str, str]] = set()
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """For `select`: readable when `admit` has something to do."""
        return self._selector.fileno()

    def admit(self, wait_s: float) -> list[Admitted]:
        """Waits up to `wait_s` seconds for something to happen; returns who has proved itself."""
        now = time.monotonic()
        wait_s = min([wait_s, *(s.until - now for s in self._strangers.values())])
        admitted: list[Admitted] = []
        for key, _ in self._selector.select(max(0.0, wait_s)):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            stranger = self._strangers.get(sock)
            if stranger is not None:
                found = self._hear(stranger)
                if found is not None:
                    admitted.append(found)
            elif sock in self._listeners:
                self._open(sock)
        now = time.monotonic()
        for stranger in [s for s in self._strangers.values() if s.until <= now]:
            self._drop(stranger, f"it said nothing useful within {self._patience_s:g} s")
        return admitted

    def _open(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of file descriptors, or it is gone already
            if self._strangers:
                self._drop(next(iter(self._strangers.values())), f"no room for more ({error})")
            else:
                time.sleep(0.01)
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            oldest = next(iter(self._strangers.values()))
            self._drop(oldest, f"{_MOST_STRANGERS} others wait to be greeted")
        where = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "this machine"
        sock.setblocking(False)
        stranger = _Stranger(
            sock, where, secrets.token_bytes(_NONCE), time.monotonic() + self._patience_s
        )
        try:
            # A new socket's buffer takes these few bytes at once, or something is wrong with it.
            if sock.send(_HELLO.pack(_MAGIC, stranger.nonce)) != _HELLO.size:
                raise OSError("its buffer is full")
        except OSError:
            sock.close()
            return
        self._strangers[sock] = stranger
        self._selector.register(sock, selectors.EVENT_READ)

    def _hear(self, stranger: _Stranger) -> Admitted | None:
        try:
            part = stranger.sock.recv(_CLAIM.size - len(stranger.read))
        except BlockingIOError:
            return None
        except OSError as error:
            self._drop(stranger, f"it broke the connection ({error})")
            return None
        if not part:
            self._drop(stranger, "it hung up before it showed that it knows the run's token")
            return None
        stranger.read += part
        if len(stranger.read) < _CLAIM.size:
            return None
        theirs, rank, proof = _CLAIM.unpack(stranger.read)
        said = self._context + stranger.nonce + theirs + struct.pack("<I", rank)
        right = hmac.compare_digest(proof, _prove(self._secret, b"dials", said))
        answer = _prove(self._secret, b"listens", said) if right else _REFUSED
        try:
            sent = stranger.sock.send(answer)
        except OSError:
            sent = 0
        if not right or sent != _PROOF:
            self._drop(
                stranger,
                "it broke the connection" if right else "it does not know the run's token",
            )
            return None
        self._forget(stranger)
        stranger.sock.setblocking(True)
        return Admitted(stranger.sock, int(rank))

    def _forget(self, stranger: _Stranger) -> None:
        self._selector.unregister(stranger.sock)
        del self._strangers[stranger.sock]

    def _drop(self, stranger: _Stranger, why: str) -> None:
        self._forget(stranger)
        with contextlib.suppress(OSError):
            stranger.sock.close()
        told = (stranger.where.rpartition(":")[0], why)
        if told in self._told or len(self._told) >= _MOST_LINES:
            return  # a flood of strangers is told once for each place and reason
        self._told.add(told)
        _log.warning("refused a connection from %s: %s", stranger.where, why)

    def close(self) -> None:
        """Closes the listeners and every connection that was not admitted."""
        for sock in [*self._strangers, *self._listeners]:
            with contextlib.suppress(OSError):
                sock.close()
        self._strangers.clear()
        self._selector.close()
