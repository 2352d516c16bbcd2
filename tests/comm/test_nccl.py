"""What of the NCCL backend needs no GPU: the suite, deadlines, aborts, errors, versions."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from raypar.comm import _nccl_api
from raypar.comm.group import Group, TensorSpec
from raypar.comm.nccl import NcclGroup
from raypar.errors import CommAbortedError, CommError
from raypar.testing.comm import Case, CommConformance

from . import fake_nccl
from .conftest import run_threads


def on_fakes(case: Callable[[NcclGroup], Any], size: int, timeout_s: float = 20.0) -> list[Any]:
    """Runs a case on NCCL groups whose ranks are threads."""

    def rank(control: Group) -> Any:
        group = fake_nccl.group_of(control)
        try:
            return case(group)
        finally:
            group.close()

    return run_threads(rank, size, timeout_s)


class TestOnFakes(CommConformance):
    """The suite itself, as it runs on GPUs."""

    free_order = False
    stream_ordered = True

    @pytest.fixture(autouse=True)
    def _library(self, library: fake_nccl.Library) -> None:
        self.library = library

    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        return on_fakes(case, size, timeout_s)


@pytest.fixture
def library() -> Iterator[fake_nccl.Library]:
    with fake_nccl.installed() as found:
        yield found


def _refused(group: NcclGroup) -> str:
    """What the group says once it has ended."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            group.barrier()
            time.sleep(0.01)
        except CommError as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError("the group goes on")


def _hang(group: NcclGroup) -> str:
    """The last rank waits for a message that nobody sends, the others for the last rank."""
    group.timeout_s = 0.3
    last = group.size - 1
    if group.rank == last:
        group.irecv(TensorSpec((8,), torch.float32), 0, "never").wait()
    else:
        group.all_reduce(torch.ones(8), name="hung").wait()
    return _refused(group)


def test_a_missed_deadline_frees_every_rank(library: fake_nccl.Library) -> None:
    told = on_fakes(_hang, 3)
    assert any("CommTimeoutError" in t and "timeout_s" in t for t in told)
    assert all("deadline" in t or "waited" in t for t in told)
    assert all(c.gone.is_set() for c in library.made)
    assert not any(c.busy for c in library.made)


def test_an_abort_frees_all_lanes_though_each_waits_for_the_device(
    library: fake_nccl.Library,
) -> None:
    """Freeing a communicator waits for all kernels of the device, those of other lanes too."""
    library.slow_abort = True

    def case(group: NcclGroup) -> None:
        group.timeout_s = 0.3
        waits = [group.irecv(TensorSpec((8,), torch.float32), 1 - group.rank, "never")]
        if group.rank == 0:
            waits.append(group.all_reduce(torch.ones(8)))
        for wait in waits:
            with contextlib.suppress(CommError):
                wait.wait()
        _refused(group)

    on_fakes(case, 2)
    assert not library.stuck
    assert not any(c.busy for c in library.made)


@pytest.mark.parametrize("error", [RuntimeError("NCCL_ERROR_SYSTEM_ERROR: x"), KeyError(6)])
def test_an_error_behind_the_back_ends_the_group_everywhere(
    library: fake_nccl.Library, error: Exception
) -> None:
    """cupy raises what NCCL reports, and KeyError for a code that it does not know."""
    both = threading.Barrier(2)

    def case(group: NcclGroup) -> str:
        spec = TensorSpec((1,), torch.float32)
        if group.rank == 0:  # a pair's communicator, not the group's own
            group.isend(torch.ones(1), 1, "t").wait()
        else:
            group.irecv(spec, 0, "t").wait()
        both.wait(20)
        if group.rank == 0:
            library.errors[library.made[-1]] = error
        return _refused(group)

    told = on_fakes(case, 2)
    assert any("SYSTEM_ERROR" in t or "code 6" in t for t in told), told
    assert any("CommAbortedError" in t and "NCCL" in t for t in told), told


def test_a_flat_bucket_is_reduced_where_it_lies(
    library: fake_nccl.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_copy(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the bucket was copied")

    def case(group: NcclGroup) -> list[float]:
        flat = torch.arange(8.0).view(2, 4) * (group.rank + 1)
        work = group.ireduce_scatter(list(flat), into=flat[group.rank], name="in place")
        assert work.wait() is not None
        return flat[group.rank].tolist()

    monkeypatch.setattr(torch, "stack", no_copy)
    assert on_fakes(case, 2) == [[0.0, 3.0, 6.0, 9.0], [12.0, 15.0, 18.0, 21.0]]


def test_rows_that_do_not_follow_one_another_are_gathered_first(
    library: fake_nccl.Library,
) -> None:
    def case(group: NcclGroup) -> list[float]:
        wide = torch.arange(12.0).view(2, 6)
        found = group.reduce_scatter([wide[1, :4], wide[0, 2:]])
        return found.tolist()

    assert on_fakes(case, 2) == [[12.0, 14.0, 16.0, 18.0], [4.0, 6.0, 8.0, 10.0]]


def test_an_abort_is_told(library: fake_nccl.Library) -> None:
    made = threading.Barrier(2)

    def case(group: NcclGroup) -> str:
        made.wait(20)  # a group that is aborted while it is made does not come to be
        if group.rank == 0:
            group.abort("a test")
        text = _refused(group)
        with pytest.raises(CommAbortedError, match="a test"):
            group.all_reduce(torch.ones(1))
        return text

    assert all("a test" in text for text in on_fakes(case, 2))


# -- versions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "installed", "says"),
    [
        ("13.0", ["cupy-cuda12x"], r"CUDA 13\.0.*cupy-cuda12x.*uninstall.*raypar\[cuda13\]"),
        ("12.8", ["cupy-cuda13x"], r"CUDA 12\.8.*cupy-cuda13x.*uninstall.*raypar\[cuda12\]"),
        ("13.0", ["cupy-cuda12x", "cupy-cuda13x"], r"both.*uninstall cupy-cuda12x"),
    ],
)
def test_a_cupy_for_another_cuda_is_told(cuda: str, installed: list[str], says: str) -> None:
    reason = _nccl_api.mismatch(cuda, installed)
    assert reason is not None
    with pytest.raises(CommError, match=says):
        raise CommError(reason)


@pytest.mark.parametrize("installed", [["cupy-cuda13x"], ["cupy"], []])
def test_a_cupy_that_fits_is_not_blamed(installed: list[str]) -> None:
    assert _nccl_api.mismatch("13.0", installed) is None
