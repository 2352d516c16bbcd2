"""What does not know the run's token, or sends nonsense: dropped, while the run goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from raypar.comm import _frames, _handshake, rendezvous
from raypar.comm._handshake import Door, DroppedError, introduce
from raypar.comm._meeting import CONTEXT
from raypar.comm.gloo import GlooGroup
from raypar.comm.group import TensorSpec
from raypar.comm.mailbox import Mailbox
from raypar.comm.network import listen
from raypar.comm.rendezvous import Address, Link, Rendezvous
from raypar.errors import CommError, CommTimeoutError
from tests.comm.test_connect import exchange, together

SECRET = b"s" * 32


@contextlib.contextmanager
def open_door(patience_s: float = 5.0) -> Iterator[tuple[Door, tuple[str, int]]]:
    listener = listen("127.0.0.1")
    door = Door([listener], SECRET, b"here", patience_s)
    try:
        yield door, listener.getsockname()
    finally:
        door.close()


def dial(where: tuple[str, int], secret: bytes, context: bytes = b"here") -> CommError | None:
    with socket.create_connection(where, 5) as sock:
        try:
            introduce(sock, secret, context, 7, time.monotonic() + 5)
        except CommError as error:
            return error
    return None


def admit_for(door: Door, seconds: float) -> list[int]:
    found: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found += [one.rank for one in door.admit(0.05)]
    return found


def beside(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(work()), daemon=True)
    thread.start()
    return thread, said


@pytest.mark.parametrize(
    ("secret", "context", "admitted"),
    [(SECRET, b"here", [7]), (b"x" * 32, b"here", []), (SECRET, b"elsewhere", [])],
)
def test_only_the_secret_opens(secret: bytes, context: bytes, admitted: list[int]) -> None:
    with open_door() as (door, where):
        thread, said = beside(lambda: dial(where, secret, context))
        assert admit_for(door, 0.3) == admitted
        thread.join(5)
    assert (said[0] is None) == bool(admitted)
    if not admitted:
        assert "do not know the same token" in str(said[0])


def test_the_secret_does_not_travel_and_a_recording_is_of_no_use() -> None:
    with open_door() as (door, where):
        recorded: list[bytes] = []
        with socket.create_connection(where, 5) as sock:

            class Tap:
                def sendall(self, data: bytes) -> None:
                    recorded.append(data)
                    sock.sendall(data)

                def __getattr__(self, name: str) -> Any:
                    return getattr(sock, name)

            thread, _ = beside(
                lambda: introduce(Tap(), SECRET, b"here", 7, time.monotonic() + 5)  # type: ignore[arg-type]
            )
            assert admit_for(door, 0.3) == [7]
            thread.join(5)
        assert SECRET not in b"".join(recorded)
        with socket.create_connection(where, 5) as sock:
            sock.sendall(b"".join(recorded))
            assert admit_for(door, 0.3) == []


def test_the_dialling_end_does_not_trust_what_listens_either() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impostor() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"raypar/1" + bytes(32))
                sock.recv(1000)
                sock.sendall(b"p" * 32)

        thread, _ = beside(impostor)
        error = dial(server.getsockname(), SECRET)
        thread.join(5)
        assert "does not know the run's token" in str(error)

        thread, _ = beside(lambda: server.accept()[0].close())
        assert isinstance(dial(server.getsockname(), SECRET), DroppedError)
        thread.join(5)


def test_slow_silent_and_many_strangers_hold_up_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_handshake, "_MOST_STRANGERS", 8)
    with caplog.at_level(logging.WARNING, "raypar.comm"), open_door(0.4) as (door, where):
        strangers = [socket.create_connection(where, 5) for _ in range(40)]
        strangers[-1].sendall(b"x")  # one byte, and then nothing for ever
        time.sleep(0.05)
        thread, said = beside(lambda: dial(where, SECRET))
        assert admit_for(door, 0.8) == [7]
        thread.join(5)
        assert said == [None]
        assert not door._strangers
        for sock in strangers:
            sock.close()
    reasons = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert sorted(reasons) == sorted(set(reasons)), "each reason is told once"
    assert any("within 0.4 s" in reason for reason in reasons)
    assert any("8 others wait" in reason for reason in reasons)


def pester(where: tuple[str, int], until: threading.Event) -> int:
    """Sends garbage, huge lengths, half-open connections and resets until told to stop."""
    kept: list[socket.socket] = []
    count = 0
    while not until.is_set():
        count += 1
        try:
            sock = socket.create_connection(where, 1)
            if count % 4 == 0:
                sock.sendall(os.urandom(500))
            elif count % 4 == 1:
                sock.sendall(struct.pack("<I", 0xFFFFFFFF) * 20)
            elif count % 4 == 2:
                kept.append(sock)
                continue
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        except OSError:
            pass
        time.sleep(0.001)
        if len(kept) > 50:
            kept.pop(0).close()
    for sock in kept:
        sock.close()
    return count


def test_a_world_comes_up_and_works_while_it_is_pestered(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(range(1000))
    monkeypatch.setattr(rendezvous, "_machine", lambda: f"machine {next(machines)}")
    server = Rendezvous(port_range=(21000, 21200))
    stop = threading.Event()
    thread, count = beside(lambda: pester((server.address.host, server.address.port), stop))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(rank: int) -> float:
        group = GlooGroup.create("pestered", rank, 3, server.address, timeout_s=30.0)
        total = exchange(group)
        group.barrier()
        group.close()
        return total

    try:
        assert together(3, one) == [600_000.0] * 3
        stop.wait(0.3)
        assert together(3, one) == [600_000.0] * 3
    finally:
        stop.set()
        thread.join(10)
        server.close()
    assert count[0] > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def test_a_member_that_says_nonsense_does_not_stop_the_rendezvous() -> None:
    others = set(threading.enumerate())
    server = Rendezvous()
    secret = bytes.fromhex(server.address.token)
    where = (server.address.host, server.address.port)
    for text in (
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 2) + b"[]",
        struct.pack("<I", 4) + b"\xff{}x",
        framed(b'{"world": "w", "size": 2, "wait_s": 1%s, "info": {}}' % (b"0" * 400)),
        framed(b'{"world": "w", "size": 2, "wait_s": 1e308, "info": {}}'),
        framed(b'{"world": ["w"], "size": 2.0, "wait_s": 1, "info": 3}'),
        b'\x0e\0\0\0{"world": null',
        b"\x05",
    ):
        with socket.create_connection(where, 5) as sock:
            introduce(sock, secret, CONTEXT, 0, time.monotonic() + 5)
            sock.sendall(text)

    results = together(
        2, lambda rank: exchange(GlooGroup.create("w", rank, 2, server.address, timeout_s=20.0))
    )
    assert results == [400_000.0] * 2
    sizes = together(
        2, lambda rank: GlooGroup.create("s", rank, 2 + rank, server.address, timeout_s=0.5)
    )
    assert any("ranks to rank" in str(error) for error in sizes), sizes
    server.close()
    own = [t for t in set(threading.enumerate()) - others if t.name == "raypar-rendezvous"]
    for thread in own:
        thread.join(10)
    assert not [t for t in own if t.is_alive()]


def test_a_rank_that_gave_up_waiting_may_come_back() -> None:
    server = Rendezvous()
    with pytest.raises(CommTimeoutError, match="rank 1 did not join"):
        GlooGroup.create("again", 0, 2, server.address, timeout_s=0.2)

    def one(rank: int) -> float:
        return exchange(GlooGroup.create("again", rank, 2, server.address, timeout_s=20.0))

    assert together(2, one) == [400_000.0] * 2


def test_an_address_does_not_print_its_token() -> None:
    address = Address("10.0.0.1", 4000, "ab" * 32)
    assert "ab" * 4 not in repr(address)


# ---- messages of a peer that is a rank, but does not behave ---------------------------------


@contextlib.contextmanager
def raw_peer() -> Iterator[tuple[GlooGroup, socket.socket]]:
    """A group of two whose other rank is just a socket."""
    here, there = socket.socketpair()
    box = Mailbox("raw", 0, 2, {1: Link(here, "a socket")})
    group = GlooGroup(box, range(2), name="raw", timeout_s=10.0)
    try:
        yield group, there
    finally:
        there.close()
        group.close()


def wire(kind: int, code: int, shape: tuple[int, ...], key: bytes, nbytes: int) -> bytes:
    head = _frames.HEADER.pack(kind, code, len(shape), len(key), nbytes)
    return head + struct.pack(f"<{len(shape)}Q", *shape) + key


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (_frames.HEADER.pack(9, 0, 0, 0, 0), "kind 9"),
        (_frames.HEADER.pack(1, 0, 65, 0, 0), "65 dimensions"),
        (_frames.HEADER.pack(1, 0, 0, 2**32 - 1, 0), "4294967295 key bytes"),
        (wire(1, 99, (1,), b"/:a", 4), "dtype code 99"),
        (wire(1, 0, (2**40,), b"/:a", 2**42), "this machine has"),
        (wire(1, 0, (2**63, 2), b"/:a", 0), "shape"),
        (wire(1, 0, (3,), b"/:a", 13), "13 bytes for a tensor of shape (3,)"),
        (wire(2, 0, (), b"", 100), "payload of 100 bytes"),
        (wire(3, 0, (), b"[1, 2]", 0), "abort"),
        (wire(3, 0, (), b'["../", "x"]', 0), "abort"),
        (wire(3, 0, (), b"[" * 5000, 0), "abort"),
    ],
)
def test_a_malformed_message_ends_the_connection_and_nothing_else(frame: bytes, said: str) -> None:
    with raw_peer() as (group, peer):
        work = group.irecv(TensorSpec((1,), torch.float32), 1, "never")
        peer.sendall(frame)
        with pytest.raises(CommError, match="sent what cannot be read") as caught:
            work.wait()
        assert said in str(caught.value)
        peer.settimeout(5)
        while peer.recv(4096):  # the socket is shut: this ends
            pass


def test_a_message_of_the_wrong_form_takes_no_memory_and_only_fails_its_receive() -> None:
    nbytes = 1 << 28
    with raw_peer() as (group, peer):
        wrong = group.irecv(TensorSpec((3,), torch.float32), 1, "x")
        right = group.irecv(TensorSpec((2,), torch.float32), 1, "x")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peer.sendall(wire(1, 0, (nbytes // 4,), b"/:x", nbytes))
        zeros = bytes(1 << 20)
        for _ in range(nbytes >> 20):
            peer.sendall(zeros)
        peer.sendall(wire(1, 0, (2,), b"/:x", 8) + struct.pack("<2f", 1.5, 2.5))
        with pytest.raises(CommError, match=r"expected shape \(3,\) torch.float32"):
            wrong.wait()
        found = right.wait()
        assert found is not None
        assert found.tolist() == [1.5, 2.5]
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < nbytes // 2


def test_a_very_long_reason_of_an_abort_arrives_shortened() -> None:
    frame = _frames.abort_frame(b"/1/", "a" * 100_000 + "\x00" * 100_000 + "the end")
    buffer = bytearray(frame)
    assert len(frame) == _frames.head_size(buffer, 0)
    path, reason = _frames.read_abort(_frames.parse_head(buffer, 0).key)
    assert path == b"/1/"
    assert reason.startswith("aaa")
    assert reason.endswith("the end")
