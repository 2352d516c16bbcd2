"""Every backend passes the one suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raypar.comm import _exchange
from raypar.comm.nccl import unavailable_reason
from raypar.errors import CommError
from raypar.testing.comm import Case, CommConformance

from .conftest import Processes, run_threads


class TestLocal(CommConformance):
    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return run_threads(case, size, timeout_s)


class TestGloo(CommConformance):
    @pytest.fixture(autouse=True)
    def _processes(self, processes: Processes) -> None:
        self.world = processes

    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return self.world.run(case, size, timeout_s)


GPUS = torch.cuda.device_count() if unavailable_reason() is None else 0


@pytest.mark.skipif(GPUS < 3, reason=unavailable_reason() or f"needs 3 GPUs, found {GPUS}")
class TestNccl(CommConformance):
    device = "cuda"
    free_order = False
    stream_ordered = True

    @pytest.fixture(autouse=True)
    def _processes(self, processes: Processes) -> None:
        self.world = processes

    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return self.world.run(case, size, timeout_s, backend="nccl")


def test_the_suite_sees_a_send_that_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **_: self)
    with pytest.raises(AssertionError):
        TestLocal().test_send_may_be_written_after_wait()


def test_the_suite_sees_subgroups_that_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _exchange.ExchangeGroup.__init__

    def one_path(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "path": b"/"})

    monkeypatch.setattr(_exchange.ExchangeGroup, "__init__", one_path)
    with pytest.raises((AssertionError, CommError)):
        TestLocal().test_subgroups()


def test_the_suite_sees_ranks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_first(self: Any, flat: torch.Tensor, op: str, call: Any) -> None:
        real(self, flat, op, call)
        call.pending.wait()
        if op == "sum" and flat.is_floating_point():
            flat += self.rank * torch.finfo(flat.dtype).eps

    real = _exchange.ExchangeGroup._reduce_whole
    monkeypatch.setattr(_exchange.ExchangeGroup, "_reduce_whole", own_first)
    with pytest.raises(AssertionError):
        TestLocal().test_all_reduce()
