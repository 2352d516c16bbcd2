"""Reading, writing, sorting and counting along cut dims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.graph.passes.emit import aten
from tests._tiers import examples
from tests.sharding.one_op import Fixed, Made, OneOp, check_op, real, whole_numbers

few = settings(max_examples=examples(4, 10), deadline=None)

ALONG: dict[str, tuple[Any, ...]] = {
    "select rows": (aten.index_select.default, real(8, 4, 4), 0, whole_numbers(8, 4)),
    "select": (aten.index_select.default, real(4, 8, 4), 1, whole_numbers(8, 12)),
    "add rows": (aten.index_add.default, real(8, 4), 0, whole_numbers(8, 12), real(12, 4)),
    "gather": (aten.gather.default, real(4, 8), 1, whole_numbers(8, 4, 4)),
    "gather fewer": (aten.gather.default, real(4, 8, 4), 1, whole_numbers(8, 4, 4, 2)),
    "take along": (aten.take_along_dim.default, real(4, 8), whole_numbers(8, 4, 4) - 8, 1),
    "scatter": (
        aten.scatter.src, real(4, 8), 1, real(4, 8).argsort(1)[:, :4], real(4, 4),
    ),
    "scatter a number": (aten.scatter.value, real(4, 8), 1, whole_numbers(8, 4, 4), 2.0),
    "scatter and add": (
        aten.scatter_add.default, real(4, 8), 1, whole_numbers(8, 4, 4), real(4, 4),
    ),
    "scatter the largest": (
        aten.scatter_reduce.two, real(4, 8), 1, whole_numbers(8, 4, 4), real(4, 4), "amax",
    ),
    "copy rows": (aten.index_copy.default, real(8, 4), 0, real(8).argsort()[:4], real(4, 4)),
    "fill rows": (aten.index_fill.int_Scalar, real(8, 4), 0, whole_numbers(8, 4), 2.0),
    "slice scatter": (aten.slice_scatter.default, real(4, 8), real(4, 7), 1, 1, 100),
    "select scatter": (aten.select_scatter.default, real(4, 8, 4), real(4, 4), 1, 2),
    "top": (aten.topk.default, real(4, 8), 2),
    "sort": (aten.sort.default, real(4, 8, 4), 1),
    "stable sort": (aten.sort.stable, real(8, 4, 4)),
    "argsort": (aten.argsort.default, real(4, 8, 4), 1),
    "k-th": (aten.kthvalue.default, real(4, 8, 4), 2, 1),
    "median": (aten.median.dim, real(4, 8, 4), 1),
    "largest so far": (aten.cummax.default, real(4, 8, 4), 1),
    "product so far": (aten.cumprod.default, real(4, 8, 4), 1),
    "place of the largest": (aten.argmax.default, real(4, 8, 4), 1),
    "the same, kept": (aten.argmax.default, real(4, 8, 4), 1, True),
    "sum so far": (aten.cumsum.default, real(4, 8, 4), 1),
    "counts so far": (aten.cumsum.default, whole_numbers(5, 8, 4), 0),
    "one hot": (aten.one_hot.default, whole_numbers(4, 4, 8), 4),
    "triangle": (aten.tril.default, real(4, 8, 8)),
    "buckets": (aten.bucketize.Tensor, Fixed(real(8, 4)), Fixed(torch.arange(-2.0, 3.0))),
    "frequencies": (aten.fft_irfft.default, torch.complex(real(4, 5), real(4, 5, seed=1)), 8, 1),
    "quantiles": (aten.quantile.default, real(4, 8, 4), Fixed(real(2).sigmoid()), 1),
    "roll": (aten.roll.default, real(4, 8), [1], [1]),
    "flip": (aten.flip.default, real(4, 8), [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONG)
def test_ops_along_one_dim(name: str) -> None:
    target, *args = ALONG[name]
    kwargs = {"stable": True, "dim": 0} if name == "stable sort" else {}
    assert check_op(target, *args, **kwargs)


def test_a_dim_that_is_read_by_index_may_be_cut() -> None:
    assert "S0 R > P" in OneOp(*ALONG["select rows"]).texts()
    assert {"S0 R Rg > S0", "P S0 S0 > P"} <= set(OneOp(*ALONG["add rows"]).texts())
    assert "S1 R > P" in OneOp(*ALONG["gather"]).texts()
    assert "R > S2" in OneOp(*ALONG["one hot"]).texts()
    assert "S0 > S0" in OneOp(*ALONG["counts so far"]).texts()


def test_what_works_over_everything_is_not_cut() -> None:
    assert OneOp(aten.argmax.default, real(4, 8)).texts() == []
    assert OneOp(aten.median.default, real(4, 8)).texts() == []
    assert "S1 > S1 S1" not in OneOp(*ALONG["top"]).texts()


SEVERAL: dict[str, tuple[Any, ...]] = {
    "rows": (real(8, 4, 4), [whole_numbers(8, 4)]),
    "rows from the end": (real(8, 4, 4), [whole_numbers(8, 4) - 8]),
    "pairs": (real(8, 4, 4), [None, whole_numbers(4, 8), whole_numbers(4, 8)]),
    "apart": (real(8, 4, 4), [whole_numbers(8, 4, 1), None, whole_numbers(4, 1, 8)]),
    "table": (real(4, 4, 8), [None, None, whole_numbers(8, 2, 4)]),
    "mask": (real(8, 12) > 0, [whole_numbers(8, 8, 1, 1, 1), whole_numbers(12, 1, 1, 1, 12)]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_indexing_with_tensors(name: str) -> None:
    value, indices = SEVERAL[name]
    assert check_op(aten.index.Tensor, value, indices)


@given(st.data())
@few
def test_any_indexing(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([2, 4, 8]), min_size=2, max_size=4))
    picked = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    made = data.draw(st.sampled_from([(4,), (2, 4), (1, 4), (4, 1)]))
    indices = [whole_numbers(n, *made) if p else None for n, p in zip(shape, picked, strict=True)]
    if not any(picked):
        return
    found = check_op(aten.index.Tensor, real(*shape), indices)
    whole = " R" * sum(picked)
    for dim, at_index in enumerate(picked):
        assert any(text.startswith(f"S{dim}{whole} > ") for text in found), (dim, at_index)


@pytest.mark.parametrize(
    "args",
    [
        (real(8, 4, 4), [whole_numbers(8, 6)], real(6, 4, 4)),
        (real(8, 4, 4), [whole_numbers(8, 6)], real(4)),
        (real(8, 4, 4), [whole_numbers(8, 6), whole_numbers(4, 6)], real(6, 4)),
    ],
    ids=["rows", "one row", "pairs"],
)
def test_writing_by_index(args: tuple[Any, ...]) -> None:
    assert "P" in " ".join(check_op(aten.index_put.default, *args, True))


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
def test_bags_of_embeddings(mode: int, padding: int | None, even: bool) -> None:
    ragged = torch.tensor([0, 1, 1, 7, 12, 20, 25, 30])
    offsets = Made(aten.arange.start_step, (0, 32, 4)) if even else ragged
    args = (real(16, 8), whole_numbers(16, 32), offsets, False, mode, False, None, False, padding)
    op = OneOp(aten.embedding_bag.padding_idx, *args, results=(0,))
    op.check()
    found = " ".join(op.texts())
    assert "S1 R R > S1" in found
    assert ("S0 R R > P" in found) == (mode != 2)
    assert ("Rg S0 S0 > S0" in found) == even


def test_bags_with_weights() -> None:
    offsets = Made(aten.arange.start_step, (0, 32, 4))
    args = (real(16, 8), whole_numbers(16, 32), offsets, False, 0, False, real(32), False, None)
    OneOp(aten.embedding_bag.padding_idx, *args, results=(0,)).check()


PAIRS: dict[str, tuple[Any, ...]] = {
    "bilinear": (aten.bilinear.default, real(8, 4), real(8, 12), real(8, 4, 12), real(8)),
    "outer": (aten.outer.default, real(8), real(4)),
    "distances": (aten.cdist.default, real(4, 8), real(12, 8)),
    "cosine": (aten.cosine_similarity.default, real(8, 4), real(8, 4, seed=1)),
    "distance": (aten.pairwise_distance.default, real(8, 4), real(8, 4, seed=1)),
    "weight norm": (aten._weight_norm.default, real(8, 4, 3), real(8, 1, 1).abs(), 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_ops_on_pairs(name: str) -> None:
    target, *args = PAIRS[name]
    assert check_op(target, *args)


LOSSES: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {
    "square": (aten.mse_loss.default, (real(8, 4), real(8, 4, seed=1)), ()),
    "huber": (aten.huber_loss.default, (real(8, 4), real(8, 4, seed=1)), (1.0,)),
    "logits": (
        aten.binary_cross_entropy_with_logits.default,
        (real(8, 4), Fixed(real(8, 4).sigmoid()), None, Fixed(real(4).abs())),
        (),
    ),
    "divergence": (aten.kl_div.default, (real(8, 4), Fixed(real(8, 4).sigmoid())), ()),
    "margins": (
        aten.multi_margin_loss.default,
        (real(8, 4), whole_numbers(4, 8), 1, 1.0, Fixed(real(4).abs())),
        (),
    ),
}


def test_a_loss_of_one_sample_is_not_counted_twice() -> None:
    found = check_op(aten.mse_loss.default, real(1, 4), real(1, 4, seed=1), 1)
    assert [t for t in found if t.endswith("> P")] == ["S1 S1 > P"]


@pytest.mark.parametrize("reduction", [0, 1, 2], ids=["none", "mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, reduction: int) -> None:
    target, before, after = LOSSES[name]
    found = check_op(target, *before, reduction, *after)
    assert all(text.endswith("> P") == (reduction > 0) for text in found)
    assert found
