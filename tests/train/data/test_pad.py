"""Samples of different lengths: what pads them, and what is told where nothing does."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import raypar as rp
from raypar.errors import DataError
from raypar.train.data import PadTo, peek

TEXTS: list[dict[str, Any]] = [
    {"tokens": list(range(1, n + 1)), "labels": list(range(1, n + 1)), "weight": 0.5}
    for n in (3, 5, 1, 4)
]
FILL = {"tokens": 0, "labels": -100}


def test_named_fields_are_padded_each_with_its_number() -> None:
    (batch,) = rp.batches(TEXTS, 4, collate_fn=PadTo(6, FILL))
    assert batch["tokens"].shape == batch["labels"].shape == (4, 6)
    assert batch["tokens"][2].tolist() == [1, 0, 0, 0, 0, 0]
    assert batch["labels"][2].tolist() == [1, -100, -100, -100, -100, -100]
    assert batch["weight"].tolist() == [0.5] * 4


@pytest.mark.parametrize("make", [list, np.asarray, torch.as_tensor])
def test_a_number_pads_every_sequence_whatever_holds_it(make: Callable[..., Any]) -> None:
    samples = [(make([1, 2, 3][:n]), n) for n in (2, 3)]
    sequences, counts = PadTo(4, 7)(samples)
    assert sequences.tolist() == [[1, 2, 7, 7], [1, 2, 3, 7]]
    assert counts.tolist() == [2, 3]
    first, second = PadTo(3, {1: -1})([(0, make([1])), (1, make([1, 2]))])
    assert (first.tolist(), second.tolist()) == ([0, 1], [[1, -1, -1], [1, 2, -1]])


def test_another_dim_and_cutting() -> None:
    grids = [torch.ones(2, n, dtype=torch.bool) for n in (1, 4)]
    batch = PadTo(3, dim=1, truncate=True)(grids)
    assert batch.shape == (2, 2, 3)
    assert batch.dtype == torch.bool
    assert batch[0].sum() == 2
    assert batch[1].all()


def test_it_works_row_by_row_also_in_other_processes() -> None:
    collate = pickle.loads(pickle.dumps(PadTo(8, FILL)))
    assert collate == PadTo(8, FILL)
    assert peek(rp.batches(TEXTS, 4, collate_fn=collate), 0).by_rows
    (loaded,) = DataLoader(TEXTS, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    (own,) = rp.batches(TEXTS, 4, collate_fn=collate)
    assert all(torch.equal(loaded[key], own[key]) for key in own)


@pytest.mark.parametrize(
    ("pad", "samples", "told"),
    [
        (PadTo(4, FILL), TEXTS, r"'tokens' has length 5, PadTo\(length=4\).*length=8.*truncate"),
        (PadTo(9, {"ids": 0}), TEXTS, r"field 'ids', and a sample has 'tokens', 'labels'"),
        (PadTo(9, {"weight": 0}), TEXTS, r"pad 'weight' along dim 0, and it is float"),
        (PadTo(9, {2: 0}), [(1, 2)], r"field 2, and a sample has the places 0 to 1"),
        (PadTo(9, {0: 0}), [torch.ones(3)], r"a sample has none: it is Tensor"),
        (PadTo(1), [torch.ones(3)], r"a sample has length 3"),
    ],
)
def test_what_cannot_be_padded_is_told(pad: PadTo, samples: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        next(iter(rp.batches(samples, len(samples), collate_fn=pad)))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 2.5}, {"length": 1, "dim": -1}])
def test_wrong_arguments_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"PadTo\.(length|dim) is .* give a whole number"):
        PadTo(**wrong)


def test_whoever_has_unlike_samples_is_shown_how_to_pad() -> None:
    with pytest.raises(DataError, match=r"list of 3 numbers.*PadTo\(8\)") as caught:
        next(iter(rp.batches(TEXTS, 4)))
    assert "dataset[1] is {tokens: list of 5 numbers" in str(caught.value)


def test_a_collate_function_that_raises_is_not_told_to_be_missing() -> None:
    def broken(samples: list[Any]) -> Any:
        raise KeyError("tokenz")

    with pytest.raises(DataError, match=r"collate_fn raised KeyError: 'tokenz'.*given 4 samples"):
        next(iter(rp.batches(TEXTS, 4, collate_fn=broken)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self.head(self.embed(tokens)).flatten(0, 1)
        return nn.functional.cross_entropy(out, labels.flatten(), ignore_index=-100)


def fit(tmp_path: Path, data: Any, **options: Any) -> rp.Result:
    return rp.Trainer(
        Tagger,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        data=data,
        steps=4,
        search_config=rp.SearchConfig(stages=2, replicas=1, microbatches=2),
        scaling_config=rp.ScalingConfig(num_workers=0),
        run_config=rp.RunConfig(name="run", storage_path=tmp_path, log_every=0),
        **options,
    ).fit()


def test_padding_does_not_change_what_is_trained(tmp_path: Path) -> None:
    """What is filled in is left out of the loss, and of the count that it is divided by."""
    texts = [{k: s[k] for k in FILL} for s in TEXTS]
    losses = [
        fit(tmp_path / str(n), rp.batches(texts, 4, collate_fn=PadTo(n, FILL))).metrics["loss"]
        for n in (5, 16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_batches_of_other_lengths_are_refused_with_the_way_out(tmp_path: Path) -> None:
    def padded_to_the_longest(samples: list[Any]) -> Any:
        return PadTo(max(len(s["tokens"]) for s in samples), FILL)(samples)

    texts = [{k: s[k] for k in FILL} for s in TEXTS]
    data = DataLoader(texts, batch_size=2, collate_fn=padded_to_the_longest)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"shape \(2, 4\), expected \(2, 5\).*PadTo\(5\)"):
        fit(tmp_path, data)
