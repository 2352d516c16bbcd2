"""The peers train the same model, wait without computing, and fail loudly. Starts processes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from release.pairs import first_losses
from release.peers import Peer, Step, Workload, ddp, eager, pipeline

TINY = Workload(layers=4, width=16, heads=2, seq_len=8, vocab=32, batch=8, microbatches=4)


def _failing(rank: int, world: int, load: Workload, **options: Any) -> Step:
    def step() -> float:
        raise ArithmeticError("on purpose")

    return step


def _cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.thorough  # the peers of one benchmark
@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("ddp",), pytest.param(("ddp", "ZBV"), marks=pytest.mark.thorough)], ids="+".join
)
def test_all_peers_train_the_same_model_and_sleep_meanwhile(names: tuple[str, ...]) -> None:
    alone = eager(0, 1, TINY)
    want = [alone() for _ in range(3)]
    peers: list[Peer] = []
    try:
        peers.append(Peer("ddp", ddp, 2, replace(TINY, microbatches=2)))
        if "ZBV" in names:
            peers.append(Peer("ZBV", pipeline, 2, TINY, schedule="ZBVZeroBubble", chunks=2))
        assert first_losses(peers, 3, 1e-4) == pytest.approx(want, abs=1e-4)
        waiting = [process.pid for peer in peers for process in peer._processes]
        before = [_cpu_ticks(pid) for pid in waiting]
        time.sleep(1.0)
        spent = [_cpu_ticks(pid) - b for pid, b in zip(waiting, before, strict=True)]
        assert max(spent) <= 10  # of about 100 ticks in that second
    finally:
        for peer in peers:
            peer.close()
    assert all(not peer._processes for peer in peers)


@pytest.mark.slow
def test_a_failing_step_brings_its_traceback_and_ends_the_processes():
    with Peer("bad", _failing, 1, TINY) as peer:
        [process] = peer._processes
        with pytest.raises(RuntimeError, match=r"bad rank 0 failed:(.|\n)*on purpose"):
            peer.steps(1)
    assert not process.is_alive()
