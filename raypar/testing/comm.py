"""The conformance suite of comm backends: one for those in raypar and for a third party's.

Subclass `CommConformance` in a test module, say how a function is run on every rank of a new group,
and pytest finds the cases::

    class TestMine(CommConformance):
        def run(self, case, *, size=3, timeout_s=20.0):
            return my_cluster.run(case, size, timeout_s)     # [case(group) for every rank]

Every case is a module-level function of (group, device), so that it can be sent to another process.
It raises AssertionError where the backend is wrong.
"""

from __future__ import annotations

import functools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.errors import CommAbortedError, CommError, CommTimeoutError

Case = Callable[[Group], Any]

MOVED_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
)  # fmt: skip
"""Dtypes that point-to-point messages, all_gather, all_to_all and broadcast must carry."""

REDUCED_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32,
    torch.int64,
)  # fmt: skip
"""Dtypes that all_reduce and reduce_scatter must add up."""

ODD = "grad of 'x', µ-batch 3 [2<1]"
"""A tag as hostile as tags get."""


class CommConformance(ABC):
    """The suite; see the module's text.

    Attributes:
        device: Where the tensors live.
        free_order: Whether tags may be received in another order than they were sent in, and a
            send goes out before its receive is posted (NCCL can do neither).
        sees_abort: Whether an abort on one rank wakes the others before their deadlines.
        sees_death: Whether a vanished rank is noticed before the deadline.
        stream_ordered: Whether `wait` orders the device's current stream instead of blocking the
            host, so that faults show at a later call, and messages carry no shape (NCCL).
    """

    device: str = "cpu"
    free_order: bool = True
    sees_abort: bool = True
    sees_death: bool = True
    stream_ordered: bool = False

    @abstractmethod
    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        """Runs ``case(group)`` on every rank of a new group of `size` ranks, at the same time.

        Returns what they returned, in rank order, and raises if one of them raised. A rank for
        which `case` raises `Vanish` must end as abruptly as the backend's world allows (a process:
        at once), and its result is None.
        """

    def check(
        self, case: Callable[..., Any], *, size: int = 3, timeout_s: float = 20.0
    ) -> list[Any]:
        """Runs a case of (group, device)."""
        return self.run(functools.partial(case, device=self.device), size=size, timeout_s=timeout_s)

    def test_fifo_per_tag(self) -> None:
        """Messages of one (source, tag) come in the order they were sent."""
        self.check(_fifo)

    def test_tags_out_of_order(self) -> None:
        """Tags are received in any order, and before as well as after they were sent."""
        if self.free_order:
            self.check(_out_of_order)

    def test_receive_first(self) -> None:
        """A receive may be posted long before its send."""
        self.check(_receive_first)

    def test_both_directions_large(self) -> None:
        """Large messages both ways at once do not deadlock."""
        self.check(_both_ways, size=2)

    def test_every_dtype(self) -> None:
        """All dtypes arrive bit for bit."""
        self.check(_dtypes)

    def test_odd_forms(self) -> None:
        """Scalars, empty, sliced, transposed and expanded tensors."""
        self.check(_forms)

    def test_wrong_form_refused(self) -> None:
        """A message of another shape or dtype than expected is a CommError that says both."""
        if not self.stream_ordered:
            self.check(_wrong_form, size=2)

    def test_send_may_be_written_after_wait(self) -> None:
        """What was sent is what was there before `wait` returned."""
        self.check(_write_after_wait, size=2)

    def test_all_reduce(self) -> None:
        """Sum, max and min of small and large tensors of every dtype; equal bits on all ranks."""
        for size in (2, 3):
            results = self.check(_all_reduce, size=size)
            assert all(r == results[0] for r in results), "ranks differ in their bits"

    def test_all_reduce_odd_forms(self) -> None:
        """Strided and empty tensors; the surroundings of a slice stay as they were."""
        self.check(_all_reduce_forms)

    def test_all_reduce_overlaps(self) -> None:
        """Many all-reduces under way at once, with messages in between."""
        self.check(_overlap)

    def test_gather_scatter(self) -> None:
        """all_gather, reduce_scatter, all_to_all, broadcast and barrier against plain torch."""
        self.check(_gather_scatter)

    def test_background_gather_scatter(self) -> None:
        """Several ireduce_scatter and iall_gather under way at once, in place and not."""
        self.check(_background)

    def test_barrier_waits(self) -> None:
        """Nobody leaves a barrier before the last has come."""
        for times in zip(*self.check(_barrier), strict=True):
            assert max(came for came, _ in times) <= min(left for _, left in times), times

    def test_subgroups(self) -> None:
        """Overlapping subgroups, in use at once with their parent, never mix messages."""
        self.check(_subgroups)

    def test_size_one(self) -> None:
        """A group of one rank does everything, alone."""
        self.check(_alone, size=1)

    def test_bad_arguments(self) -> None:
        """Unknown ranks, ops and dtypes are refused in words."""
        self.check(_bad_arguments, size=2)

    def test_timeout_text(self) -> None:
        """A timeout names group, rank, call, tag, peer, seconds, and what came instead."""
        if not self.stream_ordered:
            self.check(_timeouts, size=2, timeout_s=0.4)

    def test_abort_wakes_everybody(self) -> None:
        """An abort wakes the rank's own waiters, and other ranks' well before their deadlines."""
        if not self.stream_ordered:
            self.check(functools.partial(_abort, others=self.sees_abort), timeout_s=60.0)

    def test_abort_of_a_subgroup(self) -> None:
        """The parent goes on."""
        if not self.stream_ordered:
            self.check(functools.partial(_abort_subgroup, others=self.sees_abort), timeout_s=60.0)

    def test_dead_peer(self) -> None:
        """A rank that vanishes is reported, by number, well before the deadline."""
        if self.sees_death and not self.stream_ordered:
            self.check(_death, timeout_s=60.0)

    def test_close(self) -> None:
        """A closed group refuses calls; what was sent before still arrives."""
        if not self.stream_ordered:
            self.check(_close, size=2)


class Vanish(BaseException):
    """Raised by a case for a rank that is to die without a goodbye."""


# ---- helpers ----------------------------------------------------------------------------------


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Reproducible numbers, the same on every rank for a seed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return (torch.randint(0, 2, shape, generator=generator) == 1).to(device)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return torch.randint(0, 40, shape, generator=generator).to(dtype).to(device)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _got(work: Any) -> torch.Tensor:
    tensor = work.wait()
    assert isinstance(tensor, torch.Tensor), f"a receive gave {tensor!r}"
    return tensor


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert torch.equal(found, expected), (found, expected)


def _error(kind: type[BaseException], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was expected")


def _says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def _ring(group: Group) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


# ---- point to point ---------------------------------------------------------------------------


def _fifo(group: Group, device: str) -> None:
    after, before = _ring(group)
    sends = [
        group.isend(values(100 * group.rank + i, (i + 1,), torch.float32, device), after, ODD)
        for i in range(12)
    ]
    for i in range(12):
        expected = values(100 * before + i, (i + 1,), torch.float32, device)
        _same(_got(group.irecv(_spec(expected), before, ODD)), expected)
    for work in sends:
        work.wait()
        assert work.done()


def _out_of_order(group: Group, device: str) -> None:
    after, before = _ring(group)
    for i in range(6):
        group.isend(values(10 * group.rank + i, (40_000,), torch.float32, device), after, f"t{i}")
    late = group.irecv(TensorSpec((3,), torch.int64), before, "late")
    for i in (5, 0, 3, 1, 4, 2):
        expected = values(10 * before + i, (40_000,), torch.float32, device)
        _same(_got(group.irecv(_spec(expected), before, f"t{i}")), expected)
    assert not late.done()
    group.barrier()
    group.isend(values(group.rank, (3,), torch.int64, device), after, "late").wait()
    _same(_got(late), values(before, (3,), torch.int64, device))


def _receive_first(group: Group, device: str) -> None:
    if group.rank == 0:
        group.isend(values(1, (7,), torch.float64, device), 1, "a").wait()
        group.isend(values(2, (7,), torch.float64, device), 1, "a").wait()
    elif group.rank == 1:
        works = [group.irecv(TensorSpec((7,), torch.float64), 0, "a") for _ in range(2)]
        _same(_got(works[1]), values(2, (7,), torch.float64, device))
        _same(_got(works[0]), values(1, (7,), torch.float64, device))


def _both_ways(group: Group, device: str) -> None:
    other = 1 - group.rank
    mine = values(group.rank, (2 << 20,), torch.float32, device)
    theirs = values(other, (2 << 20,), torch.float32, device)
    for _ in range(3):
        sends = [group.isend(mine, other, f"{k}") for k in range(3)]
        for k in range(3):
            _same(_got(group.irecv(_spec(theirs), other, f"{k}")), theirs)
        for work in sends:
            work.wait()


def _dtypes(group: Group, device: str) -> None:
    after, before = _ring(group)
    for dtype in MOVED_DTYPES:
        mine = values(group.rank, (5, 3), dtype, device)
        expected = values(before, (5, 3), dtype, device)
        work = group.isend(mine, after, "d")
        _same(_got(group.irecv(_spec(expected), before, "d")), expected)
        work.wait()
        everyone = [values(r, (5, 3), dtype, device) for r in range(group.size)]
        for found, part in zip(group.all_gather(mine), everyone, strict=True):
            _same(found, part)
        swapped = group.all_to_all([values(10 * group.rank + r, (2,), dtype, device)
                                    for r in range(group.size)])  # fmt: skip
        for r, part in enumerate(swapped):
            _same(part, values(10 * r + group.rank, (2,), dtype, device))
        seen = mine.clone()
        group.broadcast(seen, root=1)
        _same(seen, everyone[1])


def _forms(group: Group, device: str) -> None:
    after, before = _ring(group)
    base = values(3, (6, 8), torch.float32, device)
    forms = [
        base[:, ::2],
        base.t(),
        base[0:0],
        base[2, 3],
        base[:1].expand(4, 8),
        torch.empty((0, 5), device=device),
        base.requires_grad_(),
    ]
    for form in forms:
        work = group.isend(form, after, "f")
        found = _got(group.irecv(_spec(form), before, "f"))
        work.wait()
        _same(found, form.detach().contiguous())
        assert found.is_contiguous()
        assert not found.requires_grad


def _wrong_form(group: Group, device: str) -> None:
    if group.rank == 0:
        group.isend(values(0, (2, 3), torch.float32, device), 1, "w").wait()
        group.isend(values(0, (6,), torch.float64, device), 1, "w").wait()
        group.isend(values(0, (6,), torch.float32, device), 1, "w").wait()
        return
    text = _error(CommError, group.irecv(TensorSpec((3, 2), torch.float32), 0, "w").wait)
    _says(text, "(3, 2)", "(2, 3)", "'w'")
    text = _error(CommError, group.irecv(TensorSpec((6,), torch.float32), 0, "w").wait)
    _says(text, "float64", "float32")
    _same(
        _got(group.irecv(TensorSpec((6,), torch.float32), 0, "w")),
        values(0, (6,), torch.float32, device),
    )


def _write_after_wait(group: Group, device: str) -> None:
    if group.rank == 0:
        for i in range(20):
            tensor = values(i, (70_000,), torch.float32, device)
            group.isend(tensor, 1, "s").wait()
            tensor.fill_(-1.0)
    else:
        for i in range(20):
            expected = values(i, (70_000,), torch.float32, device)
            found = _got(group.irecv(_spec(expected), 0, "s"))
            _same(found, expected)
            found.zero_()


# ---- collectives ------------------------------------------------------------------------------


def _reference(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """Of the parts in rank order; low precision in float32, rounded once."""
    low = parts[0].dtype in (torch.float16, torch.bfloat16)
    total = parts[0].float() if low else parts[0].clone()
    for part in parts[1:]:
        other = part.float() if low else part
        if op == "sum":
            total = total + other
        else:
            total = torch.maximum(total, other) if op == "max" else torch.minimum(total, other)
    return total.to(parts[0].dtype)


def _close_enough(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to rounding: a backend may add up in its own order, if all ranks agree."""
    if found.dtype.is_floating_point:
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps)
    else:
        _same(found, expected)


def _all_reduce(group: Group, device: str) -> bytes:
    bits = b""
    for op in ("sum", "max", "min"):
        for dtype in REDUCED_DTYPES:
            for shape in ((), (5,), (37, 29), (70_001,)):
                parts = [values(r, shape, dtype, device) for r in range(group.size)]
                mine = parts[group.rank].clone()
                group.all_reduce(mine, op=op, name="case").wait()
                _close_enough(mine, _reference(parts, op))
                bits += mine.cpu().reshape(-1).view(torch.uint8)[:64].numpy().tobytes()
    return bits


def _all_reduce_forms(group: Group, device: str) -> None:
    for rows in (6, 600):
        base = torch.zeros((rows, 80), device=device)
        column = base[:, ::2]
        column.copy_(torch.full((rows, 40), float(group.rank + 1), device=device))
        group.all_reduce(column).wait()
        total = float(sum(range(1, group.size + 1)))
        _same(column.contiguous(), torch.full((rows, 40), total, device=device))
        assert not base[:, 1::2].any(), "all_reduce wrote outside of its tensor"
    empty = torch.empty((0, 3), device=device)
    group.all_reduce(empty).wait()


def _overlap(group: Group, device: str) -> None:
    after, before = _ring(group)
    tensors = [values(50 * group.rank + i, (4_000 * i + 1,), torch.float64, device)
               for i in range(12)]  # fmt: skip
    works = []
    for i, tensor in enumerate(tensors):
        works.append(group.all_reduce(tensor, name=f"bucket {i}"))
        group.isend(values(i, (3,), torch.float32, device), after, "between")
        _same(
            _got(group.irecv(TensorSpec((3,), torch.float32), before, "between")),
            values(i, (3,), torch.float32, device),
        )
    for i in reversed(range(12)):
        works[i].wait()
        parts = [values(50 * r + i, (4_000 * i + 1,), torch.float64, device)
                 for r in range(group.size)]  # fmt: skip
        _close_enough(tensors[i], _reference(parts, "sum"))


def _gather_scatter(group: Group, device: str) -> None:
    n, rank = group.size, group.rank
    table = [
        [values(10 * r + c, (4, 3), torch.float64, device) for c in range(n)] for r in range(n)
    ]
    for found, expected in zip(group.all_gather(table[rank][0].t(), name="g"), table, strict=True):
        _same(found, expected[0].t().contiguous())
    _close_enough(
        group.reduce_scatter(table[rank], name="rs"),
        _reference([table[r][rank] for r in range(n)], "sum"),
    )
    low = [t.to(torch.bfloat16) for t in table[rank]]
    _close_enough(
        group.reduce_scatter(low),
        _reference([table[r][rank].to(torch.bfloat16) for r in range(n)], "sum"),
    )
    for r, found in enumerate(group.all_to_all(table[rank], name="a2a")):
        _same(found, table[r][rank])
    for root in range(n):
        wide = torch.zeros((3, 8), device=device, dtype=torch.float64)
        slot = wide[:, ::2]
        if rank == root:
            slot.copy_(values(root, (3, 4), torch.float64, device))
        group.broadcast(slot, root=root, name="b")
        _same(slot.contiguous(), values(root, (3, 4), torch.float64, device))


def _background(group: Group, device: str) -> None:
    n, rank = group.size, group.rank

    def rows(r: int, call: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([values(100 * call + 10 * r + c, (5,), dtype, device) for c in range(n)])

    forms = (torch.float64, torch.bfloat16)
    sums, gathers = [], []
    for call, dtype in enumerate(forms):
        flat = rows(rank, call, dtype)
        sums.append(group.ireduce_scatter(list(flat), into=flat[rank], name="in place"))
        sums.append(group.ireduce_scatter(list(rows(rank, call, dtype)), name="new"))
        gathers.append(group.iall_gather(rows(rank, call, dtype)[0], name="g"))
    for call, dtype in enumerate(forms):
        expected = _reference([rows(r, call, dtype)[rank] for r in range(n)], "sum")
        for work in sums[2 * call : 2 * call + 2]:
            found = work.wait()
            assert found is not None
            _close_enough(found, expected)
        gathered = gathers[call].wait()
        assert gathered is not None
        _same(gathered, torch.stack([rows(r, call, dtype)[0] for r in range(n)]))
    empty = group.iall_gather(torch.empty((0, 2), device=device)).wait()
    assert empty is not None
    assert tuple(empty.shape) == (n, 0, 2)


def _barrier(group: Group, device: str) -> list[tuple[float, float]]:
    """When this rank came to each barrier and left it, on the machine's one monotonic clock."""
    del device
    times = []
    for late in range(2 * group.size):
        if group.rank == late % group.size:
            time.sleep(0.01)
        came = time.monotonic()
        group.barrier(name="b")
        times.append((came, time.monotonic()))
    return times


def _subgroups(group: Group, device: str) -> None:
    pairs = [[0, 1], [1, 2], [2, 0]]
    groups = [group.subgroup(pair, f"pair {i}") for i, pair in enumerate(pairs)]
    everyone = group.subgroup([2, 1, 0], "reversed")
    assert everyone is not None
    assert everyone.rank == 2 - group.rank
    assert everyone.size == 3
    mine = [(i, g) for i, g in enumerate(groups) if g is not None]
    assert [i for i, _ in mine] == [i for i, pair in enumerate(pairs) if group.rank in pair]
    works = []
    for i, part in mine:
        assert part.name == f"pair {i}"
        assert part.size == 2
        part.isend(values(100 * i + part.rank, (5,), torch.float32, device), 1 - part.rank, "t")
    for rank in range(3):
        if rank != group.rank:
            group.isend(values(1000 + group.rank, (5,), torch.float32, device), rank, "t")
    for i, part in mine:
        tensor = torch.full((9_000,), float(10**i * (part.rank + 1)), device=device)
        works.append((i, tensor, part.all_reduce(tensor)))
    total = torch.full((9_000,), 1.0 + group.rank, device=device)
    whole = group.all_reduce(total)
    for i, tensor, work in reversed(works):
        work.wait()
        _same(tensor, torch.full((9_000,), 3.0 * 10**i, device=device))
    whole.wait()
    _same(total, torch.full((9_000,), 6.0, device=device))
    spec = TensorSpec((5,), torch.float32)
    for rank in range(3):
        if rank != group.rank:
            _same(
                _got(group.irecv(spec, rank, "t")), values(1000 + rank, (5,), torch.float32, device)
            )
    for i, part in reversed(mine):
        other = 1 - part.rank
        _same(
            _got(part.irecv(spec, other, "t")), values(100 * i + other, (5,), torch.float32, device)
        )
    nested = everyone.subgroup([0, 1], "nested")
    if nested is not None:
        mine_too = torch.tensor(float(group.rank), device=device)
        assert [float(t) for t in nested.all_gather(mine_too)] == [2.0, 1.0]
        nested.close()
    everyone.barrier()
    everyone.close()
    group.barrier()


def _alone(group: Group, device: str) -> None:
    tensor = values(0, (4,), torch.float32, device)
    kept = tensor.clone()
    group.all_reduce(tensor).wait()
    group.broadcast(tensor, root=0)
    group.barrier()
    _same(tensor, kept)
    _same(group.all_gather(tensor)[0], kept)
    _same(group.all_to_all([tensor])[0], kept)
    _same(group.reduce_scatter([tensor]), kept)
    part = group.subgroup([0], "self")
    assert part is not None
    assert part.size == 1
    part.barrier()


def _bad_arguments(group: Group, device: str) -> None:
    tensor = values(0, (4,), torch.float32, device)
    assert "ranks 0 to 1" in _error(CommError, lambda: group.isend(tensor, 2, "x"))
    assert "ranks 0 to 1" in _error(CommError, lambda: group.irecv(_spec(tensor), -1, "x"))
    assert "'sum'" in _error(CommError, lambda: group.all_reduce(tensor, op="summ"))
    assert "bool" in _error(CommError, lambda: group.all_reduce(tensor > 0))
    assert "one per rank" in _error(CommError, lambda: group.all_to_all([tensor]))
    assert "ranks" in _error(CommError, lambda: group.subgroup([0, 0], "twice"))
    group.barrier()


# ---- faults -----------------------------------------------------------------------------------


def _timeouts(group: Group, device: str) -> None:
    if group.rank == 1:
        group.isend(values(0, (3,), torch.float32, device), 0, "other").wait()
        time.sleep(1.0)
        return
    work = group.irecv(TensorSpec((3,), torch.float32), 1, "x' mb 3")
    text = _error(CommTimeoutError, work.wait)
    _says(text, group.name, "rank 0", "recv", "mb 3", "from rank 1", "waited 0.", "timeout_s")
    assert re.search(r"'other' \d\.\d s ago", text), text
    text = _error(
        CommTimeoutError, group.all_reduce(torch.ones(3, device=device), name="norm").wait
    )
    _says(text, "rank 0", "all_reduce", "norm", "rank 1", "waited")
    # The message that came meanwhile is still there, and a retried receive works.
    _same(
        _got(group.irecv(TensorSpec((3,), torch.float32), 1, "other")),
        values(0, (3,), torch.float32, device),
    )


def _abort(group: Group, device: str, others: bool) -> None:
    receive = group.irecv(TensorSpec((3,), torch.float32), (group.rank + 1) % group.size, "never")
    ready = TensorSpec((1,), torch.float32)
    if group.rank == 0:
        for rank in range(1, group.size):
            _got(group.irecv(ready, rank, "ready"))
        group.abort("a test")
        group.abort("again")
    else:
        group.isend(torch.ones(1, device=device), 0, "ready").wait()
        if not others:
            return
    began = time.monotonic()
    reduce: list[Any] = []
    one = torch.ones(3, device=device)
    text = _error(CommAbortedError, receive.wait)
    _says(text, "a test", "'never'", "rank 0")
    text = _error(CommAbortedError, lambda: reduce.append(group.all_reduce(one)))
    _says(text, "a test", "all_reduce")
    assert "a test" in _error(CommAbortedError, lambda: group.isend(one, 0, "x"))
    assert time.monotonic() - began < 30.0
    group.close()


def _abort_subgroup(group: Group, device: str, others: bool) -> None:
    part = group.subgroup([0, 1], "part")
    if part is not None:
        work = part.irecv(TensorSpec((3,), torch.float32), 1 - part.rank, "never")
        if part.rank == 0:
            part.isend(torch.ones(1, device=device), 1, "ready").wait()
        else:
            _got(part.irecv(TensorSpec((1,), torch.float32), 0, "ready"))
            part.abort("only this")
        if part.rank == 1 or others:
            assert "only this" in _error(CommAbortedError, work.wait)
    total = torch.ones(20_000, device=device)
    group.all_reduce(total).wait()
    _same(total, torch.full((20_000,), 3.0, device=device))


def _death(group: Group, device: str) -> None:
    last = group.size - 1
    group.barrier()
    if group.rank == last:
        group.isend(torch.ones(3, device=device), 0, "will").wait()
        raise Vanish
    spec = TensorSpec((3,), torch.float32)
    waiting = group.irecv(spec, last, "never")
    began = time.monotonic()
    text = _error(CommError, waiting.wait)
    _says(text, f"rank {last}", "'never'")
    tensor = torch.ones(50_000, device=device)
    text = _error(CommError, lambda: group.all_reduce(tensor, name="after").wait())
    _says(text, f"rank {last}", "all_reduce")
    assert time.monotonic() - began < 30.0
    if group.rank == 0:  # what came before the end can still be read
        _same(_got(group.irecv(spec, last, "will")), torch.ones(3, device=device))
    # The survivors can still talk.
    group.isend(torch.ones(3, device=device), 1 - group.rank, "left").wait()
    _got(group.irecv(spec, 1 - group.rank, "left"))


def _close(group: Group, device: str) -> None:
    spec = TensorSpec((300_000,), torch.float32)
    if group.rank == 0:
        group.isend(values(5, spec.shape, spec.dtype, device), 1, "will")
        group.close()
        group.close()
        assert "closed" in _error(CommAbortedError, lambda: group.irecv(spec, 1, "x"))
        return
    _same(_got(group.irecv(spec, 0, "will")), values(5, spec.shape, spec.dtype, device))
    assert "rank 0" in _error(CommError, group.irecv(spec, 0, "more").wait)
