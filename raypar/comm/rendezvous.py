"""How the ranks of a world find each other and connect.

Rank 0's process serves a small store and hands its `Address` (a picklable value) to the others, by
whatever means the caller has, for example an actor call. Then every rank calls `connect`, in any
order and at any time before the deadline, and gets one connected socket for every peer: a unix
socket where both are on one machine and see the same files, TCP otherwise.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import shutil
import socket
import struct
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raypar.errors import CommError, CommTimeoutError

_HELLO = struct.Struct("<64sI")
_POLL_S = 0.05
_LONGEST_BASE = 80  # "/raypar-12345678/s" is added; the path of a unix socket has 103 bytes at most


@dataclass(frozen=True, slots=True)
class Address:
    """Where a rendezvous is served, and the secret that lets a process join it.

    Attributes:
        host: Host name or IP that all ranks can reach.
        port: TCP port.
        token: 64 hex digits; connections that do not know it are refused.
    """

    host: str
    port: int
    token: str


class Rendezvous:
    """Serves an address at which worlds meet; one serves any number of worlds, by name.

    Keep it until all ranks have joined; `close` (or dropping it) ends the service. Groups that have
    been made do not need it any more.

    Args:
        host: Host name or IP of this machine as the other ranks reach it.

    Raises:
        CommError: The host cannot be served from here.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            self._store: TCPStore | None = TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
            )
        except RuntimeError as error:
            raise CommError(
                f"cannot serve a rendezvous at host {host!r}: {_first_line(error)}; "
                "give an address of this machine, for example host='127.0.0.1'"
            ) from None
        self.address = Address(host, self._store.port, secrets.token_hex(32))

    def close(self) -> None:
        """Ends the service."""
        self._store = None


@dataclass
class Link:
    """One connection.

    Attributes:
        sock: Connected, blocking.
        label: Who is at the other end: ``pid 17 on host``.
    """

    sock: socket.socket
    label: str


def connect(
    name: str, rank: int, size: int, address: Address, *, host: str, timeout_s: float
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

    Raises:
        CommTimeoutError: Some ranks did not join in time; the text names them.
        CommError: The rendezvous or a peer cannot be reached.
    """
    return _Join(name, rank, size, address, host, time.monotonic() + timeout_s, timeout_s).run()


class _Join:
    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        address: Address,
        host: str,
        deadline: float,
        timeout_s: float,
    ) -> None:
        self._who = f"{name} rank {rank}"
        self._rank, self._size = rank, size
        self._address, self._host = address, host
        self._deadline, self._timeout_s = deadline, timeout_s
        try:
            self._store = TCPStore(
                address.host,
                address.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, timeout_s)),
            )
            use = self._store.add(f"raypar/{name}/uses/{rank}", 1)
        except RuntimeError as error:
            raise CommError(
                f"{self._who}: cannot reach the rendezvous at {address.host}:{address.port}: "
                f"{_first_line(error)}; is rank 0's process alive, and its host reachable?"
            ) from None
        self._prefix = f"raypar/{name}/{use}"
        self._folder = tempfile.mkdtemp(prefix="raypar-", dir=_socket_base())
        self._listeners: list[socket.socket] = []

    def run(self) -> dict[int, Link]:
        links: dict[int, Link] = {}
        try:
            self._listen()
            peers = {r: self._info(r) for r in range(self._rank)}
            for peer, info in peers.items():
                links[peer] = Link(self._dial(peer, info), str(info["label"]))
            self._accept(links)
        except BaseException:
            for link in links.values():
                link.sock.close()
            raise
        finally:
            for listener in self._listeners:
                listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        for link in links.values():
            link.sock.settimeout(None)
        return links

    def _listen(self) -> None:
        path = str(Path(self._folder) / "s")
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listeners.append(local)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        remote = socket.socket(family, socket.SOCK_STREAM)
        self._listeners.append(remote)
        try:
            local.bind(path)
            remote.bind((self._host, 0))
        except OSError as error:
            raise CommError(
                f"{self._who}: cannot listen at host {self._host!r} or {path!r}: {error}; pass an "
                "address of this machine as host"
            ) from None
        for listener in self._listeners:
            listener.listen(self._size)
        info = {
            "machine": _machine(),
            "unix": path,
            "host": self._host,
            "port": remote.getsockname()[1],
            "label": f"pid {os.getpid()} on {socket.gethostname()}",
        }
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(info))

    def _info(self, peer: int) -> dict[str, object]:
        key = f"{self._prefix}/{peer}"
        left = self._deadline - time.monotonic()
        try:
            self._store.wait([key], timedelta(seconds=max(0.001, left)))
            found: dict[str, object] = json.loads(self._store.get(key))
            return found
        except RuntimeError as error:
            raise self._missing(_first_line(error)) from None

    def _missing(self, why: str) -> CommError:
        try:
            silent = [
                r for r in range(self._size) if not self._store.check([f"{self._prefix}/{r}"])
            ]
        except RuntimeError:
            return CommError(
                f"{self._who}: the rendezvous at {self._address.host}:{self._address.port} went "
                f"away while ranks were joining ({why}); keep rank 0's Rendezvous until all joined"
            )
        who = f"rank {', '.join(map(str, silent))} did not join" if silent else "a peer is stuck"
        return CommTimeoutError(
            f"{self._who}: connecting {self._size} ranks: waited {self._timeout_s:.1f} s; {who}. "
            f"If they are only slow to start, raise timeout_s (now {self._timeout_s:g}), for "
            f"example to {4 * self._timeout_s:g}"
        )

    def _dial(self, peer: int, info: dict[str, object]) -> socket.socket:
        hello = _HELLO.pack(self._address.token.encode(), self._rank)
        tries: list[tuple[socket.AddressFamily, object]] = []
        if info["machine"] == _machine():
            tries.append((socket.AF_UNIX, info["unix"]))
        host = str(info["host"])
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tries.append((family, (host, info["port"])))
        problems: list[str] = []
        for kind, where in tries:
            sock = socket.socket(kind, socket.SOCK_STREAM)
            sock.settimeout(max(0.001, self._deadline - time.monotonic()))
            try:
                sock.connect(where)  # type: ignore[arg-type]
                if kind != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(hello)
                return sock
            except OSError as error:
                problems.append(f"{where}: {error}")
                sock.close()
        raise CommError(
            f"{self._who}: cannot connect to rank {peer} ({info['label']}): {'; '.join(problems)}"
        )

    def _accept(self, links: dict[int, Link]) -> None:
        """Takes the connections of all higher ranks."""
        while len(links) < self._size - 1:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._missing("deadline")
            for listener in select.select(self._listeners, [], [], left)[0]:
                sock, _ = listener.accept()
                peer = self._greet(sock)
                if peer is None or not self._rank < peer < self._size or peer in links:
                    sock.close()
                    continue
                if listener.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                links[peer] = Link(sock, str(self._info(peer)["label"]))

    def _greet(self, sock: socket.socket) -> int | None:
        """The rank that a new connection says it is, if it knows the secret."""
        sock.settimeout(max(_POLL_S, min(5.0, self._deadline - time.monotonic())))
        raw = b""
        try:
            while len(raw) < _HELLO.size:
                part = sock.recv(_HELLO.size - len(raw))
                if not part:
                    return None
                raw += part
        except OSError:
            return None
        token, peer = _HELLO.unpack(raw)
        return int(peer) if hmac.compare_digest(token, self._address.token.encode()) else None


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
