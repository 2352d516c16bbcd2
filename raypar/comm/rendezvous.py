"""How the ranks of a world find each other and connect.

Rank 0's process serves a `Rendezvous` and hands its `Address` (a picklable value) to the others, by
whatever means the caller has, for example an actor call. Then every rank calls `connect`, in any
order and at any time before the deadline, and gets one connected socket for every peer: a unix
socket where both are on one machine and see the same files, TCP otherwise.

Nothing here is for strangers: every listening socket is bound to one address of its machine, and a
connection is read only after it has proved that it knows the address's token (`_handshake.py`).
Torch's `TCPStore` would do neither: whatever host it is given, it listens on all interfaces, and
anyone who reaches it may write to it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar.comm._handshake import Door, DroppedError, introduce
from raypar.comm._meeting import (
    CONTEXT,
    LENGTH,
    LONGEST_WAIT_S,
    MOST_ANSWER_BYTES,
    Meeting,
)
from raypar.comm.network import listen
from raypar.errors import CommError, CommTimeoutError

_LONGEST_BASE = 80  # "/raypar-12345678/s" is added; the path of a unix socket has 103 bytes at most
_GRACE_S = 2.0
_TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rendezvous is served, and the secret that lets a process join it.

    Attributes:
        host: Host name or IP that all ranks can reach.
        port: TCP port.
        token: 64 hex digits, which are not printed; connections that do not know it are refused.
    """

    host: str
    port: int
    token: str = field(repr=False)


class Rendezvous:
    """Serves an address at which worlds meet; one serves any number of worlds, by name.

    Keep it until all ranks have joined; `close` (or dropping it) ends the service. Groups that have
    been made do not need it any more.

    Args:
        host: Host name or IP of this machine as the other ranks reach it; bound to it alone.
        port_range: First and last port to try; None for any.

    Raises:
        CommError: The host cannot be served from here, or every port of the range is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port_range: tuple[int, int] | None = None) -> None:
        try:
            listener = listen(host, port_range)
        except CommError as error:
            raise CommError(f"cannot serve a rendezvous: {error}") from None
        token = secrets.token_hex(_TOKEN_BYTES)
        self.address = Address(host, int(listener.getsockname()[1]), token)
        self._end = weakref.finalize(self, Meeting(listener, bytes.fromhex(token)).stop)

    def close(self) -> None:
        """Ends the service."""
        self._end()


@dataclass
class Link:
    """One connection.

    Attributes:
        sock: Connected, blocking.
        label: Who is at the other end: ``pid 17 on host``.
    """

    sock: socket.socket
    label: str


@dataclass(frozen=True, slots=True)
class _Info:
    """What a rank tells the others of itself.

    Attributes:
        machine: Equal for processes that can meet over a unix socket.
        unix: Path of its unix socket.
        host: Where it listens, with `port`.
        port: TCP port.
        door: What its listeners are called; part of every handshake with them.
        label: Who it is, for people.
    """

    machine: str
    unix: str
    host: str
    port: int
    door: str
    label: str

    def plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def connect(
    name: str,
    rank: int,
    size: int,
    address: Address,
    *,
    host: str,
    timeout_s: float,
    port_range: tuple[int, int] | None = None,
) -> dict[int, Link]:
    """Connects this rank with every other rank of the world `name`.

    A name may be used again once all ranks are done with its last use: the n-th time a rank joins
    it meets those for which it is the n-th time too.

    Args:
        name: The world's name.
        rank: This rank.
        size: Number of ranks.
        address: What rank 0's `Rendezvous` gave.
        host: Host name or IP of this machine as the other ranks reach it.
        timeout_s: Deadline for all of it, in seconds.
        port_range: First and last port on which to listen for the others; None for any.

    Raises:
        CommTimeoutError: Some ranks did not join in time; the text names them.
        CommError: The rendezvous or a peer cannot be reached, or does not know the token.
    """
    join = _Join(name, rank, size, address, host, timeout_s, port_range)
    return join.run()


class _Join:
    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        address: Address,
        host: str,
        timeout_s: float,
        port_range: tuple[int, int] | None,
    ) -> None:
        self._name, self._who = name, f"{name} rank {rank}"
        self._rank, self._size = rank, size
        self._address, self._host, self._port_range = address, host, port_range
        self._secret = bytes.fromhex(address.token)
        self._deadline, self._timeout_s = time.monotonic() + timeout_s, timeout_s
        self._door_name = secrets.token_hex(16)

    def run(self) -> dict[int, Link]:
        links: dict[int, Link] = {}
        folder = tempfile.mkdtemp(prefix="raypar-", dir=_socket_base())
        door: Door | None = None
        try:
            door, info = self._listen(str(Path(folder) / "s"))
            infos = self._meet(info)
            for peer in range(self._rank):
                links[peer] = Link(self._dial(peer, infos[peer]), infos[peer].label)
            self._accept(door, links, infos)
        except BaseException:
            for link in links.values():
                link.sock.close()
            raise
        finally:
            if door is not None:
                door.close()
            shutil.rmtree(folder, ignore_errors=True)
        for link in links.values():
            link.sock.settimeout(None)
        return links

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _listen(self, path: str) -> tuple[Door, _Info]:
        try:
            remote = listen(self._host, self._port_range)
        except CommError as error:
            raise CommError(f"{self._who}: {error}") from None
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            local.bind(path)
            local.listen(max(128, self._size))
        except OSError as error:
            local.close()
            remote.close()
            raise CommError(f"{self._who}: cannot listen at {path!r}: {error}") from None
        info = _Info(
            machine=_machine(),
            unix=path,
            host=self._host,
            port=int(remote.getsockname()[1]),
            door=self._door_name,
            label=f"pid {os.getpid()} on {socket.gethostname()}",
        )
        return Door([local, remote], self._secret, _context(info)), info

    # ---- meeting the others ---------------------------------------------------------------

    def _meet(self, info: _Info) -> list[_Info]:
        """Tells the rendezvous where this rank is; returns where all ranks are."""
        where = f"{self._address.host}:{self._address.port}"
        try:
            sock = socket.create_connection(
                (self._address.host, self._address.port), max(0.001, self._left())
            )
        except OSError as error:
            raise CommError(
                f"{self._who}: cannot reach the rendezvous at {where}: {error}; is rank 0's "
                "process alive, and its host reachable?"
            ) from None
        with sock:
            try:
                introduce(sock, self._secret, CONTEXT, self._rank, self._deadline)
            except CommError as error:
                raise CommError(f"{self._who}: the rendezvous at {where}: {error}") from None
            asked = {
                "world": self._name,
                "size": self._size,
                "wait_s": min(LONGEST_WAIT_S, max(0.0, self._left())),
                "info": info.plain(),
            }
            try:
                body = json.dumps(asked).encode()
                sock.sendall(LENGTH.pack(len(body)) + body)
                answer = self._hear(sock)
            except (OSError, ValueError) as error:
                raise CommError(
                    f"{self._who}: the rendezvous at {where} went away while ranks were joining "
                    f"({error}); keep rank 0's Rendezvous until all joined"
                ) from None
        return self._roster(answer)

    def _hear(self, sock: socket.socket) -> Any:
        (length,) = LENGTH.unpack(self._exactly(sock, LENGTH.size))
        if length > MOST_ANSWER_BYTES:
            raise ValueError(f"it answers with {length} bytes")
        return json.loads(self._exactly(sock, length))

    def _exactly(self, sock: socket.socket, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            sock.settimeout(max(0.001, self._left() + _GRACE_S))
            part = sock.recv(min(count - len(data), 1 << 20))
            if not part:
                raise OSError("it hung up")
            data += part
        return bytes(data)

    def _roster(self, answer: Any) -> list[_Info]:
        if "missing" in answer:
            silent = [r for r in answer["missing"] if r != self._rank]
            who = ", ".join(map(str, silent))
            raise self._late(f"rank {who} did not join")
        if "ranks" not in answer:
            raise CommError(f"{self._who}: the rendezvous says: {answer.get('error')}")
        infos = [_Info(**{k: info[k] for k in _Info.__slots__}) for info in answer["ranks"]]
        if len(infos) != self._size:
            raise CommError(f"{self._who}: the rendezvous knows {len(infos)} of {self._size} ranks")
        return infos

    def _late(self, who: str) -> CommTimeoutError:
        return CommTimeoutError(
            f"{self._who}: connecting {self._size} ranks: waited {self._timeout_s:.1f} s; {who}. "
            f"If they are only slow to start, raise timeout_s (now {self._timeout_s:g}), for "
            f"example to {4 * self._timeout_s:g}"
        )

    # ---- connecting with them -------------------------------------------------------------

    def _dial(self, peer: int, info: _Info) -> socket.socket:
        ways: list[tuple[socket.AddressFamily, Any]] = []
        if info.machine == _machine():
            ways.append((socket.AF_UNIX, info.unix))
        family = socket.AF_INET6 if ":" in info.host else socket.AF_INET
        ways.append((family, (info.host, info.port)))
        problems: list[str] = []
        pause = 0.02
        while True:
            again = False
            problems.clear()
            for kind, where in ways:
                try:
                    return self._connect(kind, where, info)
                except DroppedError as error:  # it may be busy with strangers
                    again = True
                    problems.append(f"{where}: {error}")
                except (OSError, CommError) as error:
                    problems.append(f"{where}: {error}")
            if not again or self._left() <= pause:
                break
            time.sleep(pause)
            pause = min(1.0, 2 * pause)
        raise CommError(
            f"{self._who}: cannot connect to rank {peer} ({info.label}): {'; '.join(problems)}"
        )

    def _connect(self, kind: socket.AddressFamily, where: Any, info: _Info) -> socket.socket:
        sock = socket.socket(kind, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.001, self._left()))
            sock.connect(where)
            if kind != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            introduce(sock, self._secret, _context(info), self._rank, self._deadline)
        except BaseException:
            sock.close()
            raise
        return sock

    def _accept(self, door: Door, links: dict[int, Link], infos: list[_Info]) -> None:
        """Takes the connections of all higher ranks."""
        while len(links) < self._size - 1:
            if self._left() <= 0:
                silent = [r for r in range(self._rank + 1, self._size) if r not in links]
                raise self._late(f"rank {', '.join(map(str, silent))} joined but did not connect")
            for one in door.admit(self._left()):
                if not self._rank < one.rank < self._size or one.rank in links:
                    one.sock.close()
                    continue
                if one.sock.family != socket.AF_UNIX:
                    one.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                links[one.rank] = Link(one.sock, infos[one.rank].label)


def _context(info: _Info) -> bytes:
    return f"link {info.door}".encode()


def _machine() -> str:
    """The same text for processes of one machine that see the same temporary folder."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{boot}/{socket.gethostname()}/{_socket_base()}"


def _socket_base() -> str:
    """A temporary folder short enough for the path of a unix socket."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= _LONGEST_BASE and os.access(folder, os.W_OK):
            return folder
    raise CommError(
        f"no writable temporary folder with a path of at most {_LONGEST_BASE} bytes, which sockets "
        f"need: {tempfile.gettempdir()!r} is longer; set TMPDIR=/tmp"
    )
