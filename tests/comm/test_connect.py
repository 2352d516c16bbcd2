"""Meeting, sockets and frames, with threads for processes."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.comm import _frames, rendezvous
from raypar.comm.gloo import GlooGroup
from raypar.comm.group import Group, TensorSpec
from raypar.comm.rendezvous import Address, Rendezvous
from raypar.errors import CommAbortedError, CommError, CommTimeoutError
from tests._tiers import examples


def together(size: int, one: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = one(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def exchange(group: Group) -> float:
    """A message around and a large all-reduce."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    work = group.isend(torch.full((100_000,), float(group.rank)), after, "x")
    found = group.irecv(TensorSpec((100_000,), torch.float32), before, "x").wait()
    work.wait()
    assert found is not None
    assert float(found[-1]) == before
    total = torch.ones(200_000)
    group.all_reduce(total).wait()
    return float(total.sum())


def test_who_leaves_an_aborted_group_tells_the_reason_to_who_has_not_heard_it() -> None:
    """The word of the rank that aborted may come later than the goodbyes of those it reached."""
    server = Rendezvous()

    def one(rank: int) -> str:
        group = GlooGroup.create("left", rank, 2, server.address, timeout_s=60.0)
        try:
            if rank == 0:
                group._endpoint._abort_here(b"/", "rank 7: out of memory")
                return ""
            with pytest.raises(CommAbortedError) as caught:
                group.irecv(TensorSpec((1,), torch.float32), 0, "x").wait()
            return str(caught.value)
        finally:
            group.close()

    try:
        found = together(2, one)
    finally:
        server.close()
    assert "rank 7: out of memory" in str(found[1])


def test_late_ranks_and_a_name_used_again() -> None:
    server = Rendezvous()

    def one(rank: int) -> list[float]:
        sums = []
        for _ in range(2):
            time.sleep(0.05 * rank)
            group = GlooGroup.create("again", rank, 3, server.address, timeout_s=20.0)
            sums.append(exchange(group))
            group.barrier()
            group.close()
        return sums

    assert together(3, one) == [[600_000.0] * 2] * 3


def test_across_machines_goes_by_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(range(1000))
    monkeypatch.setattr(rendezvous, "_machine", lambda: f"machine {next(machines)}")
    server = Rendezvous()
    families: list[int] = []

    def one(rank: int) -> float:
        group = GlooGroup.create("tcp", rank, 2, server.address, timeout_s=20.0)
        endpoint: Any = group._endpoint
        families.extend(peer._sock.family for peer in endpoint._peers.values())
        found = exchange(group)
        group.close()
        return found

    assert together(2, one) == [400_000.0] * 2
    assert families == [socket.AF_INET] * 2


def test_two_worlds_at_once_do_not_mix() -> None:
    server = Rendezvous()

    def one(rank: int) -> tuple[float, float]:
        a = GlooGroup.create("a", rank, 2, server.address, timeout_s=20.0)
        b = GlooGroup.create("b", 1 - rank, 2, server.address, timeout_s=20.0)
        a.isend(torch.ones(1), 1 - a.rank, "t")
        b.isend(torch.full((1,), 2.0), 1 - b.rank, "t")
        spec = TensorSpec((1,), torch.float32)
        from_b = b.irecv(spec, 1 - b.rank, "t").wait()
        from_a = a.irecv(spec, 1 - a.rank, "t").wait()
        assert from_a is not None
        assert from_b is not None
        a.barrier()
        a.close()
        b.close()
        return float(from_a), float(from_b)

    assert together(2, one) == [(1.0, 2.0)] * 2


def test_missing_ranks_are_named() -> None:
    server = Rendezvous()

    def one(rank: int) -> None:
        GlooGroup.create("few", rank, 4, server.address, timeout_s=0.5)

    for result in together(2, one):
        assert isinstance(result, CommTimeoutError)
        assert "2, 3 did not join" in str(result)
        assert "timeout_s" in str(result)


def test_a_stranger_is_refused() -> None:
    server = Rendezvous()
    wrong = Address(server.address.host, server.address.port, "0" * 64)

    def one(rank: int) -> None:
        GlooGroup.create("secret", rank, 2, wrong if rank else server.address, timeout_s=1.0)

    results = together(2, one)
    assert isinstance(results[0], CommTimeoutError)


def test_no_rendezvous() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", free.getsockname()[1], "0" * 64)
    with pytest.raises(CommError, match="cannot reach the rendezvous"):
        GlooGroup.create("none", 1, 2, address, timeout_s=0.2)
    with pytest.raises(CommError, match="need a rendezvous"):
        GlooGroup.create("none", 1, 2, None)
    with pytest.raises(CommError, match="ranks 0 to 1, not 2"):
        GlooGroup.create("none", 2, 2, None)


def test_no_thread_is_left_behind() -> None:
    server = Rendezvous()

    def one(rank: int) -> None:
        group = GlooGroup.create("threads", rank, 2, server.address, timeout_s=20.0)
        exchange(group)
        if rank:
            group.abort("enough")
        group.close()

    together(2, one)
    left = [t.name for t in threading.enumerate() if "-threads-" in t.name]
    assert not left, left


@settings(max_examples=examples(17, 50), deadline=None)
@given(
    key=st.binary(max_size=4096),
    shape=st.lists(st.integers(0, 5), max_size=6),
    dtype=st.sampled_from(_frames.DTYPES),
)
def test_headers_round_trip(key: bytes, shape: list[int], dtype: torch.dtype) -> None:
    tensor = torch.empty(shape, dtype=dtype)
    header = _frames.data_header(key, tuple(shape), dtype)
    buffer = bytearray(b"??" + header + b"rest")
    assert _frames.head_size(buffer, 2) == len(header)
    head = _frames.parse_head(buffer, 2)
    assert head == (_frames.DATA, dtype, tuple(shape), key, len(_frames.payload(tensor)))


def test_a_long_temporary_folder_does_not_break_the_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    server = Rendezvous()

    def one(rank: int) -> float:
        group = GlooGroup.create("long", rank, 2, server.address, timeout_s=20.0)
        total = exchange(group)
        group.close()
        return total

    assert together(2, one) == [400_000.0] * 2
