"""Backends by name, reductions, matching, and what of NCCL needs no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypar.comm import _nccl_api, registry
from raypar.comm._inbox import Inbox
from raypar.comm._reduce import reduce_in_order
from raypar.comm._work import Pending
from raypar.comm.gloo import GlooGroup
from raypar.comm.local import LocalGroup
from raypar.comm.nccl import NcclGroup
from raypar.errors import CommAbortedError, CommError, CommTimeoutError


def test_registry() -> None:
    assert registry.backend_names() == ("gloo", "local", "nccl")
    assert registry.get_backend("gloo") is GlooGroup
    assert registry.get_backend("local") is LocalGroup
    assert registry.unavailable("gloo") is None
    with pytest.raises(CommError, match=r"gloo, local, nccl.*Did you mean 'gloo'"):
        registry.get_backend("glo")
    with pytest.raises(CommError, match="registered already"):
        registry.register_backend("gloo", "a:B")
    with pytest.raises(CommError, match="module:Class"):
        registry.register_backend("mine", "a.B")
    assert registry.backend_for("cpu") == "gloo"
    assert registry.backend_for("cuda:1") == "nccl"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_nccl_without_gpu_says_so() -> None:
    with pytest.raises(CommError, match=r"'nccl' cannot be used here: .*'gloo'"):
        registry.get_backend("nccl")
    with pytest.raises(CommError, match="torch sees no CUDA GPU"):
        NcclGroup.create("w", 0, 1, None)


def test_nccl_pip_lines() -> None:
    assert _nccl_api.pip_line("12.8") == "pip install 'raypar[cuda12]'"
    assert _nccl_api.pip_line("13.0") == "pip install 'raypar[cuda13]'"
    assert "CUDA 12 or 13" in _nccl_api.pip_line("11.8")


def test_nccl_types() -> None:
    assert _nccl_api.moved_as(torch.empty(3, 2, dtype=torch.complex64)) == (48, 1)
    assert _nccl_api.reduced_as(torch.bfloat16, "sum", "c") == (1, 9, 0)
    assert _nccl_api.reduced_as(torch.complex128, "sum", "c") == (2, 8, 0)
    assert _nccl_api.reduced_as(torch.bool, "max", "c") == (1, 1, 2)
    for dtype, op in ((torch.bool, "sum"), (torch.int16, "sum"), (torch.complex64, "max")):
        with pytest.raises(CommError, match=f"c: NCCL has no {op} of {dtype}"):
            _nccl_api.reduced_as(dtype, op, "c")
    with pytest.raises(CommError, match="unknown op 'avg'"):
        _nccl_api.reduced_as(torch.float32, "avg", "c")


@given(st.lists(st.lists(st.integers(-128, 255), min_size=128, max_size=128), max_size=3))
def test_nccl_ids_travel(ids: list[list[int]]) -> None:
    assert _nccl_api.unpack_ids(_nccl_api.pack_ids(ids)) == [tuple(one) for one in ids]


def test_nccl_errors_in_words() -> None:
    with pytest.raises(CommError, match="128 bytes"):
        _nccl_api.pack_ids([(1, 2)])
    told = _nccl_api.explain(RuntimeError("NCCL_ERROR_INVALID_USAGE: x"), "w rank 0: send")
    assert "own GPU" in str(told)
    assert str(told).startswith("w rank 0: send")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("place", [0, -1])
def test_reduction_into_one_of_its_parts(count: int, place: int) -> None:
    parts = [torch.full((4,), 10.0**i) for i in range(count)]
    expected = sum(10.0**i for i in range(count))
    reduce_in_order(parts, "sum", out=parts[place])
    assert parts[place].tolist() == [expected] * 4


def test_low_precision_is_rounded_once() -> None:
    parts = [torch.tensor([256.0, 1.0]).bfloat16()] + [torch.ones(2).bfloat16()] * 2
    out = torch.empty(2, dtype=torch.bfloat16)
    reduce_in_order(parts, "sum", out=out)
    assert out.tolist() == [258.0, 3.0]  # one at a time, 256 + 1 rounds to 256 in bfloat16


def _pending(timeout_s: float = 5.0, into: torch.Tensor | None = None) -> Pending:
    return Pending(lambda: "call", timeout_s, into=into)


def test_inbox_order_and_faults() -> None:
    aborted: dict[bytes, str] = {}
    inbox = Inbox(aborted)
    waiting = [_pending() for _ in range(2)]
    for pending in waiting:
        inbox.post(b"/:a", pending)
    for value in (1.0, 2.0, 3.0):
        inbox.deliver(b"/:a", torch.tensor(value))
    late = _pending()
    inbox.post(b"/:a", late)
    assert [float(p.wait()) for p in (*waiting, late)] == [1.0, 2.0, 3.0]  # type: ignore[arg-type]
    assert "'a'" in inbox.arrived()
    assert "not asked for" not in inbox.arrived()

    inbox.deliver(b"/0/:b", torch.tensor(4.0))
    assert "not asked for yet: 'b'" in inbox.arrived()
    child, parent = _pending(), _pending()
    inbox.post(b"/0/:c", child)
    inbox.post(b"/:c", parent)
    aborted[b"/0/"] = "why"
    inbox.abort(b"/0/", "why")
    with pytest.raises(CommAbortedError, match="call: why"):
        child.wait()
    refused = _pending()
    inbox.post(b"/0/:b", refused)
    with pytest.raises(CommAbortedError, match="why"):
        refused.wait()
    assert not parent.done()
    inbox.deliver(b"/:kept", torch.tensor(5.0))
    inbox.break_off(CommError, "gone")
    with pytest.raises(CommError, match="gone"):
        parent.wait()
    kept = _pending()
    inbox.post(b"/:kept", kept)
    assert float(kept.wait()) == 5.0  # type: ignore[arg-type]


def test_inbox_claims_a_buffer_only_where_the_message_fits() -> None:
    inbox = Inbox({})
    into = torch.zeros(3)
    pending = _pending(into=into)
    inbox.post(b"/:a", pending)
    assert inbox.claim(b"/:b", (3,), torch.float32) == (None, True)  # nobody waits for it yet
    assert inbox.claim(b"/:a", (3,), torch.float32) == (pending, True)
    inbox.deliver(b"/:a", into, pending)
    assert pending.wait() is into
    late = _pending(into=into)
    inbox.deliver(b"/:a", torch.ones(3))
    inbox.post(b"/:a", late)
    assert late.wait() is into
    assert into.tolist() == [1.0] * 3


@pytest.mark.parametrize(("shape", "dtype"), [((4,), torch.float32), ((3,), torch.float64)])
def test_a_message_of_another_form_is_refused_before_it_is_read(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inbox = Inbox({})
    waiting = [_pending(into=torch.zeros(3)), _pending(timeout_s=0.0, into=torch.zeros(3))]
    for pending in waiting:
        inbox.post(b"/:a", pending)
        assert inbox.claim(b"/:a", shape, dtype) == (pending, False)
    outline = torch.empty(shape, dtype=dtype, device="meta")
    inbox.refuse(b"/:a", waiting[0], outline)
    assert waiting[0].wait() is outline
    assert inbox.broken is None
    with pytest.raises(CommTimeoutError):
        waiting[1].wait()
    inbox.refuse(b"/:a", waiting[1], outline)  # too late to tell it: nobody may get that message
    assert inbox.broken is not None
    assert "another form" in inbox.broken[1]


def test_a_message_that_lost_to_the_deadline_is_kept() -> None:
    inbox = Inbox({})
    pending = _pending(timeout_s=0.0)
    inbox.post(b"/:a", pending)
    with pytest.raises(CommTimeoutError, match=r"waited 0\.0 s"):
        pending.wait()
    inbox.deliver(b"/:a", torch.tensor(1.0))
    again = _pending()
    inbox.post(b"/:a", again)
    assert float(again.wait()) == 1.0  # type: ignore[arg-type]
