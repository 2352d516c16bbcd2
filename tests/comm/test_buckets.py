"""Gradient buckets against plain sums."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.comm.buckets import GradBuckets
from raypar.comm.gather import Copy, GatherBuckets
from raypar.comm.group import Group, TensorSpec
from raypar.comm.scatter import ScatterBuckets, Split
from raypar.compat import TorchDispatchMode
from raypar.errors import CommError
from raypar.programs.products import Product
from raypar.sharding.pieces import Piece, piece_of
from raypar.sharding.spec import ShardingSpec
from tests._tiers import examples

from .conftest import Processes, run_threads

SHAPES = ((3, 4), (), (70_000,), (0, 2), (5,), (33, 7))


def _specs(dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> list[TensorSpec]:
    return [TensorSpec(s, dtypes[i % len(dtypes)]) for i, s in enumerate(SHAPES)]


def _grad(rank: int, step: int, microbatch: int, index: int, spec: TensorSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 100 * step + 10 * microbatch + index)
    return torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(spec.dtype)


def _expected(size: int, step: int, m: int, index: int, spec: TensorSpec) -> torch.Tensor:
    parts = []
    for rank in range(size):
        total = _grad(rank, step, 0, index, spec)
        for k in range(1, m):
            total = total + _grad(rank, step, k, index, spec)
        parts.append(total)
    return sum(parts[1:], parts[0])


def train(group: Group, m: int, bucket_bytes: int, average: bool) -> int:
    """Three steps of m microbatches; returns the most all-reduces begun before `finish`."""
    specs = _specs((torch.float64, torch.float32))
    buckets = GradBuckets(specs, group, bucket_bytes, average, "g", never=(4,))
    early = 0
    for step in range(3):
        for k in range(m):
            for index, spec in enumerate(specs):
                if index != 4:
                    grad = _grad(group.rank, step, k, index, spec)
                    buckets.add(index, grad, last=k == m - 1)
                    if group.size > 1:
                        grad.fill_(7.0)  # what was added is no longer needed
        early = max(early, buckets._launched)
        found = buckets.finish()
        for index, spec in enumerate(specs):
            grad = found[index]
            if index == 4:
                assert grad is None
                continue
            assert grad is not None
            expected = _expected(group.size, step, m, index, spec)
            if average:
                expected = expected / group.size
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
            if spec.dtype == torch.float64:
                torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)
        buckets.reset()
    return early


@settings(max_examples=examples(5, 15), deadline=None)
@given(
    size=st.integers(1, 3),
    m=st.integers(1, 3),
    bucket_bytes=st.sampled_from((1, 300, 100_000, 1 << 30)),
    average=st.booleans(),
)
def test_equals_plain_sums(size: int, m: int, bucket_bytes: int, average: bool) -> None:
    run_threads(lambda g: train(g, m, bucket_bytes, average), size, 20.0)


def _train_case(group: Group) -> int:
    return train(group, 2, 100_000, False)


def test_between_processes(processes: Processes) -> None:
    # Two float64 buckets (one closed by the large tensor) and one or two of float32.
    assert min(processes.run(_train_case, 2, 20.0)) >= 2


def test_buckets_leave_before_finish_in_one_order() -> None:
    specs = [TensorSpec((4,), torch.float32) for _ in range(4)]

    def rank(group: Group) -> list[int]:
        buckets = GradBuckets(specs, group, bucket_bytes=16)
        launched = []
        order = (0, 1, 2, 3) if group.rank == 0 else (1, 0, 3, 2)
        for index in order:
            buckets.add(index, torch.full((4,), float(index)), last=True)
            launched.append(buckets._launched)
        found = buckets.finish()
        assert [float(g[0]) for g in found if g is not None] == [0.0, 2.0, 4.0, 6.0]
        return launched

    assert run_threads(rank, 2, 20.0) == [[1, 2, 3, 4], [0, 2, 2, 4]]


def test_missing_on_one_rank_counts_as_zeros() -> None:
    specs = [TensorSpec((2,), torch.float32)] * 2

    def rank(group: Group) -> None:
        buckets = GradBuckets(specs, group)
        for value in (3.0, 5.0):  # the second step must not see the first one's values
            if group.rank == 0:
                buckets.add(0, torch.full((2,), value), last=True)
            found = buckets.finish()
            assert [g.tolist() for g in found if g is not None] == [[value, value], [0.0, 0.0]]
            buckets.reset()

    run_threads(rank, 2, 20.0)


def test_alone_keeps_by_reference_and_never_writes() -> None:
    specs = [TensorSpec((3,), torch.float32)] * 3
    buckets = GradBuckets(specs, None)
    first, second = torch.ones(3), torch.full((3,), 2.0)
    buckets.add(0, first, last=False)
    buckets.add(1, first, last=True)  # two parameters may get one and the same tensor
    buckets.add(0, second, last=True)
    found = buckets.finish()
    assert found[2] is None
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].tolist() == [3.0] * 3
    assert found[1].tolist() == [1.0] * 3
    found[0].mul_(0.5)
    found[1].mul_(0.5)
    assert first.tolist() == [1.0] * 3
    assert second.tolist() == [2.0] * 3

    buckets.reset()
    alone = torch.ones(3)
    buckets.add(0, alone, last=True)
    kept = buckets.finish()[0]
    assert kept is not None
    assert kept.data_ptr() == alone.data_ptr()


def test_bad_use() -> None:
    buckets = GradBuckets([TensorSpec((3,), torch.float32)] * 2, None, name="stage 2", never=[1])
    with pytest.raises(CommError, match=r"stage 2: gradient 0 has shape \(4,\).*expected \(3,\)"):
        buckets.add(0, torch.ones(4), last=True)
    with pytest.raises(CommError, match="float64"):
        buckets.add(0, torch.ones(3, dtype=torch.float64), last=True)
    with pytest.raises(CommError, match="never"):
        buckets.add(1, torch.ones(3), last=True)
    buckets.add(0, torch.ones(3), last=False)
    with pytest.raises(CommError, match="last microbatch of gradient 0"):
        buckets.finish()
    buckets.add(0, torch.ones(3), last=True)
    with pytest.raises(CommError, match="after its last"):
        buckets.add(0, torch.ones(3), last=True)
    with pytest.raises(CommError, match="bucket_bytes"):
        GradBuckets([], None, bucket_bytes=0)
    with pytest.raises(CommError, match="never names"):
        GradBuckets([], None, never=[3])


# ---- gradients and parameters that are cut over the ranks -----------------------------------

CUT = (((12, 5), "S0"), ((5, 24), "S1"), ((24, 3), "S0/2"), ((12,), "S0"), ((0, 12), "S1"))


def _pieces(shape: tuple[int, ...], state: str, size: int) -> tuple[Piece, ...]:
    spec = ShardingSpec.parse(state)
    return tuple(piece_of(spec.ranges(shape, (size,), (rank,))) for rank in range(size))


def _splits(size: int, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> list[Split]:
    return [
        # Whatever is announced as a product may still come as a tensor.
        Split(TensorSpec(shape, dtypes[i % len(dtypes)]), _pieces(shape, state, size), i % 2 == 1)
        for i, (shape, state) in enumerate(CUT)
    ]


def scatter(group: Group, m: int, bucket_bytes: int, every_microbatch: bool) -> int:
    """Three steps of m microbatches; returns the most flat memory ever held, in bytes."""
    splits = _splits(group.size, (torch.float64, torch.float32))
    buckets = ScatterBuckets(splits, group, bucket_bytes, every_microbatch, "g")
    most = 0
    for step in range(3):
        for k in range(m):
            for index, split in enumerate(splits):
                grad = _grad(group.rank, step, k, index, split.spec)
                buckets.add(index, grad, last=k == m - 1)
                grad.fill_(7.0)  # what was added is no longer needed
                most = max(most, sum(t.numel() * t.itemsize for t in buckets.tensors()))
        for index, (split, found) in enumerate(zip(splits, buckets.finish(), strict=True)):
            expected = _expected(group.size, step, m, index, split.spec)
            own = split.pieces[group.rank].read(expected)
            bound = 1e-13 if split.spec.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found, own.contiguous(), rtol=bound, atol=bound)
        buckets.reset()
    return most


@settings(max_examples=examples(7, 20), deadline=None)
@given(
    size=st.integers(2, 3),
    m=st.integers(1, 3),
    bucket_bytes=st.sampled_from((1, 700, 1 << 30)),
    every_microbatch=st.booleans(),
)
def test_scattered_equals_parts_of_plain_sums(
    size: int, m: int, bucket_bytes: int, every_microbatch: bool
) -> None:
    run_threads(lambda g: scatter(g, m, bucket_bytes, every_microbatch), size, 20.0)


def _scatter_case(group: Group) -> int:
    return scatter(group, 2, 700, True)


def test_scattered_between_processes(processes: Processes) -> None:
    processes.run(_scatter_case, 2, 20.0)


def test_with_rounds_no_more_than_two_uncut_buckets_live() -> None:
    shape, count = (64, 4), 10
    split = Split(TensorSpec(shape, torch.float64), _pieces(shape, "S0", 2))

    def held(group: Group, every_microbatch: bool) -> int:
        buckets = ScatterBuckets([split] * count, group, 64 * 4 * 8, every_microbatch)
        most = 0
        for k in range(3):
            for index in range(count):
                buckets.add(index, torch.ones(shape, dtype=torch.float64), last=k == 2)
                most = max(most, sum(t.numel() for t in buckets.tensors()))
        assert all(bool((g == 6.0).all()) for g in buckets.finish())
        return most

    whole = 64 * 4
    assert run_threads(lambda g: held(g, False), 2, 20.0) == [count * whole] * 2
    assert max(run_threads(lambda g: held(g, True), 2, 20.0)) <= count * whole // 2 + 2 * whole


def test_a_gradient_that_comes_on_one_rank_alone_counts_as_zeros_elsewhere() -> None:
    split = Split(TensorSpec((4,), torch.float32), _pieces((4,), "S0", 2))

    def rank(group: Group) -> None:
        buckets = ScatterBuckets([split, split], group)
        for value in (3.0, 5.0):  # the second step must not see the first one's values
            if group.rank == 0:
                buckets.add(1, torch.full((4,), value), last=True)
            assert [g.tolist() for g in buckets.finish()] == [[0.0] * 2, [value] * 2]
            buckets.reset()

    run_threads(rank, 2, 20.0)


def test_bad_use_of_scattered_buckets() -> None:
    splits = [Split(TensorSpec((4,), torch.float32), _pieces((4,), "S0", 2))] * 2

    def rank(group: Group) -> None:
        buckets = ScatterBuckets(splits, group, name="stage 2")
        with pytest.raises(CommError, match=r"stage 2: gradient 0 has shape \(3,\).*\(4,\)"):
            buckets.add(0, torch.ones(3), last=True)
        buckets.add(0, torch.ones(4), last=False)
        with pytest.raises(CommError, match="last microbatch of gradient 0"):
            buckets.finish()
        buckets.add(0, torch.ones(4), last=True)
        with pytest.raises(CommError, match="after its last"):
            buckets.add(0, torch.ones(4), last=True)
        rounds = ScatterBuckets(splits, group, every_microbatch=True)
        rounds.add(0, torch.ones(4), last=False)
        with pytest.raises(CommError, match="gradient 0 came twice before the other"):
            rounds.add(0, torch.ones(4), last=True)
        with pytest.raises(CommError, match="cut in 3 pieces, but the group has 2 ranks"):
            ScatterBuckets(_splits(3), group)

    run_threads(rank, 2, 20.0)


@settings(max_examples=examples(5, 15), deadline=None)
@given(
    size=st.integers(2, 3),
    bucket_bytes=st.sampled_from((1, 700, 1 << 30)),
    views=st.lists(st.booleans(), min_size=len(CUT), max_size=len(CUT)),
)
def test_gathered_copies_are_what_the_ranks_hold(
    size: int, bucket_bytes: int, views: list[bool]
) -> None:
    splits = _splits(size, (torch.float64, torch.bfloat16))
    fresh = [_grad(9, 0, 0, i, split.spec) for i, split in enumerate(splits)]

    def rank(group: Group) -> None:
        copies = []
        for split, view, new in zip(splits, views, fresh, strict=True):
            whole = torch.full(split.spec.shape, torch.nan, dtype=split.spec.dtype)
            piece = split.pieces[group.rank]
            own = piece.read(whole)
            own = own if view and len(piece.boxes) == 1 else own.clone()
            own.copy_(piece.read(new))
            copies.append(Copy(whole, own, split.pieces))
        buckets = GatherBuckets(copies, group, bucket_bytes)
        buckets.start()
        with pytest.raises(CommError, match="before the last one was finished"):
            buckets.start()
        assert buckets.finish()
        assert not buckets.finish()
        for copy, new in zip(copies, fresh, strict=True):
            assert torch.equal(copy.whole, new)

    run_threads(rank, size, 20.0)


# ---- products -------------------------------------------------------------------------------


class _Ops(TorchDispatchMode):  # type: ignore[misc]
    """Names of the ops that run, and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.seen.append((str(function), tuple(made.shape)))
        return made


def _product(microbatch: int, shape: tuple[int, ...] = (4, 2, 4)) -> Product:
    generator = torch.Generator().manual_seed(microbatch)
    left = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    right = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    return Product(left, right, shape)


def _add_products(group: Group | None) -> None:
    buckets = GradBuckets([TensorSpec((4, 2, 4), torch.float64)], group)
    for _ in range(2):
        products = [_product(k) for k in range(4)]
        with _Ops() as ops:
            for k, product in enumerate(products):
                buckets.add(0, product, last=k == 3)
        (found,) = buckets.finish()
        wanted = sum(p.tensor() for p in products) * (1 if group is None else group.size)
        torch.testing.assert_close(found, wanted)
        # The first makes the sum, the others add to it; none exists for itself.
        first = "aten.mm.default" if group is None else "aten.mm.out"
        made = [name for name, _ in ops.seen if "mm" in name or "add" in name]
        assert made == [first, *["aten.addmm_.default"] * 3]
        buckets.reset()


def test_products_are_added_to_the_sum_as_they_are_made() -> None:
    _add_products(None)
    run_threads(lambda group: _add_products(group), 2, 20.0)


def _scatter_products(
    group: Group, bucket_bytes: int, shape: tuple[int, ...], state: str, told: bool, whole: bool
) -> None:
    """A product between two small gradients, summed over microbatches and cut over ranks."""
    small = Split(TensorSpec((4,), torch.float64), _pieces((4,), "S0", group.size))
    spec = TensorSpec(shape, torch.float64)
    large = Split(spec, _pieces(shape, state, group.size), told)
    buckets = ScatterBuckets([small, large, small], group, bucket_bytes)
    for _ in range(2):
        products = [_product(k, shape) for k in range(4)]
        with _Ops() as ops:
            for k, product in enumerate(products):
                buckets.add(0, torch.ones(4, dtype=torch.float64), last=k == 3)
                buckets.add(1, product, last=k == 3)
                buckets.add(2, torch.ones(4, dtype=torch.float64), last=k == 3)
        first, found, third = buckets.finish()
        assert first.eq(4.0 * group.size).all()
        assert third.eq(4.0 * group.size).all()
        wanted = sum(p.tensor() for p in products) * group.size
        own = large.pieces[group.rank].read(wanted).contiguous()
        torch.testing.assert_close(found, own)
        made = [name for name, _ in ops.seen if "mm" in name]
        if bucket_bytes <= 256 and whole:  # 32 elements: it fills a bucket
            assert made == ["aten.mm.out", *["aten.addmm_.default"] * 3]
        else:
            assert made == ["aten.mm.default"] * 4
        buckets.reset()


@pytest.mark.parametrize(
    ("shape", "state", "told", "whole"),
    [
        ((4, 2, 4), "S0", False, True),
        ((4, 2, 4), "S1", True, False),
        ((4, 8), "S1", True, True),
        ((4, 8), "S1", False, False),  # nobody said that it comes as a product
        ((8, 4), "S1", True, False),  # columns of another view of what the matrices make
        ((4, 8), "S1/2", True, False),
    ],
)
@pytest.mark.parametrize("bucket_bytes", [256, 1 << 20])
def test_products_are_added_to_sums_that_are_cut_in_rows_or_columns(
    bucket_bytes: int, shape: tuple[int, ...], state: str, told: bool, whole: bool
) -> None:
    run_threads(
        lambda group: _scatter_products(group, bucket_bytes, shape, state, told, whole), 2, 20.0
    )


def test_products_and_tensors_add_up_to_one_sum() -> None:
    """A tied parameter: one stage delivers a product, the other does not."""
    spec = TensorSpec((4, 2, 4), torch.float64)
    plain = torch.ones(4, 2, 4, dtype=torch.float64)
    for order in itertools.permutations([_product(0), plain, plain]):
        buckets = GradBuckets([spec], None)
        for at, gradient in enumerate(order):
            buckets.add(0, gradient, last=at == 2)
        (found,) = buckets.finish()
        torch.testing.assert_close(found, _product(0).tensor() + 2.0)
    assert plain.eq(1.0).all()  # a caller's tensor is never written


def test_a_product_of_another_shape_is_refused() -> None:
    buckets = GradBuckets([TensorSpec((4, 8), torch.float64)], None)
    with pytest.raises(CommError, match=r"shape \(4, 2, 4\).*expected \(4, 8\)"):
        buckets.add(0, _product(0), last=True)
