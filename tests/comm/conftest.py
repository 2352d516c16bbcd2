"""Worlds of ranks for the comm tests: threads, and processes that are started once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from raypar.comm.gloo import GlooGroup
from raypar.comm.group import Group
from raypar.comm.local import LocalWorld
from raypar.comm.nccl import NcclGroup
from raypar.comm.rendezvous import Address, Rendezvous
from raypar.testing.comm import Vanish


def run_threads(case: Callable[[Group], Any], size: int, timeout_s: float) -> list[Any]:
    """Runs `case` on every rank of a LocalWorld."""
    world = LocalWorld(size, name="world", timeout_s=timeout_s)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(r: int) -> None:
        try:
            results[r] = case(world.group(r))
        except Vanish:
            world.group(r).close()
        except BaseException as error:
            errors.append(error)
            world.abort(f"rank {r} failed: {error}")

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    while True:
        task = pipe.recv()
        if task is None:
            return
        case, name, rank, size, address, timeout_s, backend = task
        group: GlooGroup | NcclGroup | None = None
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
                group = NcclGroup.create(name, rank, size, address, timeout_s=20.0)
            else:
                group = GlooGroup.create(name, rank, size, address, timeout_s=20.0)
            group.timeout_s = timeout_s
            pipe.send((True, case(group)))
        except Vanish:
            os._exit(0)
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            if group is not None:
                group.abort("a rank's test failed")
        if group is not None:
            group.close()


class Processes:
    """A few processes, each a rank; a dead one is replaced when it is needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, tuple[Any, multiprocessing.connection.Connection]] = {}
        self._rendezvous = Rendezvous()
        self._count = 0

    @property
    def address(self) -> Address:
        return self._rendezvous.address

    def start(self, size: int) -> None:
        for rank in range(size):
            if rank not in self._workers:
                mine, theirs = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._workers[rank] = (process, mine)

    def run(
        self, case: Callable[[Group], Any], size: int, timeout_s: float, backend: str = "gloo"
    ) -> list[Any]:
        self.start(size)
        self._count += 1
        name = f"world {self._count}"
        for rank in range(size):
            task = (case, name, rank, size, self.address, timeout_s, backend)
            self._workers[rank][1].send(task)
        results: list[Any] = []
        problems: list[str] = []
        for rank in range(size):
            process, pipe = self._workers[rank]
            try:
                assert pipe.poll(90), f"rank {rank} hangs"
                right, value = pipe.recv()
            except EOFError:
                process.join(10)
                assert process.exitcode == 0, f"rank {rank} crashed: {process.exitcode}"
                del self._workers[rank]
                right, value = True, None
            results.append(value)
            if not right:
                problems.append(f"rank {rank}:\n{value}")
        assert not problems, "\n".join(problems)
        return results

    def close(self) -> None:
        for process, pipe in self._workers.values():
            pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
        self._workers.clear()
        self._rendezvous.close()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    world = Processes()
    world.start(3)
    yield world
    world.close()
