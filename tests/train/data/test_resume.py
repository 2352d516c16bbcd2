"""A run that is stopped and goes on reads what an uninterrupted one reads: no sample twice, none
left out, for every kind of source, whatever the ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.comm.local import LocalWorld
from raypar.errors import DataError
from raypar.stages.spec import RankSpec
from raypar.train.data import BatchForm, DataPosition, RandomState, batches, joined, peek
from raypar.train.feed import DataFeed, HeldBatches
from tests._tiers import examples
from tests.stages.fakes import fake_specs
from tests.train.data.sources import KINDS, Batch, Numbered, Stateful, batch_of, by_number

SIZE = 4


def specs(replicas: int, microbatches: int, size: int) -> list[RankSpec]:
    """Replicas of a first stage that reads x, and one of a last that reads y."""
    made = fake_specs(2 * replicas)
    return [
        dataclasses.replace(
            spec,
            group=int(spec.rank >= replicas),
            replica=spec.rank % replicas,
            replicas=replicas,
            microbatches=microbatches,
            global_batch=size,
            inputs=("in:0",) if spec.rank < replicas else ("in:1",),
            batch_dims=(0, 0),
        )
        for spec in made
    ]


def whole(parts: list[Any], replicas: int, microbatches: int) -> torch.Tensor:
    """The global batch that the replicas' rows are parts of."""
    rows = torch.stack([p.unflatten(0, (microbatches, -1)) for p in parts], 1)
    return rows.flatten(0, 2)


def segment(
    data: Any,
    start: Any,
    steps: int,
    replicas: int,
    microbatches: int,
    accumulate: int = 1,
    **end: Any,
) -> tuple[list[Batch], Any]:
    """Reads steps on ranks of their own; gives the global batches, and the position after them."""
    opened = peek(data, 3, accumulate=accumulate)
    size = SIZE * accumulate
    ranks = specs(replicas, microbatches, size)
    feed = DataFeed(
        HeldBatches(opened), BatchForm(opened.example), ranks,
        start=DataPosition.from_json(json.loads(json.dumps(start))), **end,
    )  # fmt: skip
    world = LocalWorld(len(ranks), timeout_s=20)
    found: list[Batch] = []
    with ThreadPoolExecutor(len(ranks)) as pool:
        feeds = list(pool.map(lambda s: feed.for_rank(s.rank)(s, world.group(s.rank)), ranks))
        try:
            for one in feeds:
                one.extend(100)  # more than is taken: what is read ahead must not count
            for step in range(50, 50 + steps):
                taken = list(pool.map(lambda f, s=step: f.take(s), feeds))
                if None in taken:
                    assert taken == [None] * len(ranks)
                    break
                x = whole([t["in:0"] for t in taken[:replicas]], replicas, microbatches)
                y = whole([t["in:1"] for t in taken[replicas:]], replicas, microbatches)
                found.append({"x": x, "y": y})
            state = feeds[0].data_state(50 + len(found))  # type: ignore[attr-defined]
        finally:
            for one in feeds:
                one.close()
    return found, state


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(p[k], q[k]) for p, q in zip(a, b) for k in p)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(4, 6))
@given(data=st.data())
def test_runs_that_stop_anywhere_and_change_their_ranks_read_what_one_run_reads(
    kind: str, data: st.DataObject
) -> None:
    length = data.draw(st.integers(2 * SIZE, 15), label="samples")
    accumulate = data.draw(st.sampled_from([1, 1, 2]), label="accumulate")
    before = RandomState.now()
    try:
        made = KINDS[kind]
        once, end = segment(made(length, SIZE), {}, 8, 1, 1, accumulate)
        assert end["samples"] == 8 * SIZE * accumulate
        found: list[Batch] = []
        at: Any = {}
        while len(found) < 8:
            steps = data.draw(st.integers(1, 8 - len(found)), label="steps")
            replicas = data.draw(st.sampled_from([1, 2, 4]), label="replicas")
            microbatches = data.draw(st.sampled_from([1, SIZE // replicas]), label="microbatches")
            part, at = segment(made(length, SIZE), at, steps, replicas, microbatches, accumulate)
            found += part
        assert same(found, once)
        assert {k: at[k] for k in ("samples", "epoch", "index")} == {
            k: end[k] for k in ("samples", "epoch", "index")
        }
    finally:
        before.set()


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("map", 6),  # 10 samples, batches of 4: two in each of three epochs
        ("map, no sample left out", 8),  # 30 samples, and two more to fill the last batch
        ("list", 6),
        ("loader", 6),
        ("stateful", 6),
        ("callable that starts anywhere", 6),
    ],
)
def test_data_of_so_many_epochs_end_on_all_ranks_before_the_same_step(
    kind: str, steps: int
) -> None:
    made = KINDS[kind]
    before = RandomState.now()
    found, at = segment(made(10, SIZE), {}, 50, 2, 2, epochs=3)
    assert len(found) == steps
    assert at["samples"] == steps * SIZE
    opened = peek(made(10, SIZE), 3)
    assert opened.steps_in(3) in (steps, None)
    part, at = segment(made(10, SIZE), {}, 3, 1, 1, epochs=3)
    rest, _ = segment(made(10, SIZE), at, 50, 2, 1, epochs=3)
    before.set()
    assert same(part + rest, found)


def test_an_iterator_ends_after_its_one_epoch_without_an_error() -> None:
    data = [batch_of([i] * SIZE) for i in range(3)]
    found, _ = segment(iter(data), {}, 50, 2, 1, epochs=1)
    assert len(found) == 3
    opened = peek(iter(data), 0)
    with pytest.raises(DataError, match="ended after 3 batches"):
        list(opened.read(SIZE, epochs=2))


def test_a_loader_with_a_state_and_a_callable_that_starts_anywhere_read_nothing_twice() -> None:
    _, at = segment(Stateful(40, SIZE), {}, 5, 1, 1)
    loader = Stateful(40, SIZE)
    found, _ = segment(loader, at, 1, 1, 1)
    assert found[0]["y"].tolist() == [20, 21, 22, 23]
    assert loader.read <= 1 + 1 + 3, "peeked once, then from the sixth batch on"
    calls: list[tuple[int, int]] = []

    def recorded(epoch: int = 0, start_sample: int = 0) -> Any:
        calls.append((epoch, start_sample))
        return by_number(10, SIZE)(epoch, start_sample)

    _, at = segment(recorded, {}, 3, 1, 1)
    calls.clear()
    segment(recorded, at, 1, 1, 1)
    assert calls[0] == (0, 0)  # peek
    assert calls[1] == (1, 4)


def test_a_saved_loader_state_needs_a_loader_and_fewer_batches_are_told() -> None:
    _, at = segment(Stateful(40, SIZE), {}, 5, 1, 1)
    with pytest.raises(DataError, match="has no load_state_dict"):
        segment(KINDS["list"](40, SIZE), at, 1, 1, 1)
    _, at = segment(KINDS["list"](40, SIZE), {}, 5, 1, 1)
    with pytest.raises(DataError, match=r"had read 5 batches of this epoch.*has 2 now"):
        segment(KINDS["list"](8, SIZE), at, 1, 1, 1)


def test_the_global_batch_may_change_with_a_resume() -> None:
    made = batches(Numbered(23), 4, shuffle=True, seed=1, drop_last=False)
    first = list(itertools.islice(peek(made, 0).read(4), 3))
    wider = batches(Numbered(23), 6, shuffle=True, seed=1, drop_last=False)
    at = first[-1][1]
    assert isinstance(at, DataPosition)
    rest = list(peek(wider, 0).read(6, at, epochs=1))
    seen = [i for b, _ in first + rest for i in b["y"].tolist()]
    assert sorted(seen[:23]) == list(range(23))


def test_joined_batches_are_one_batch_and_broadcast_values_must_agree() -> None:
    parts = [(torch.full((2, 3), float(i)), torch.ones(5)) for i in range(3)]
    x, shared = joined(parts)
    assert x[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert shared.shape == (5,)
    with pytest.raises(DataError, match=r"accumulate=2: batch\[1\] has no batch dim .*batch_dims"):
        joined([parts[0], (parts[1][0], torch.zeros(5))])
    with pytest.raises(DataError, match=r"accumulate=5 needs 5"):
        peek(parts, 0, accumulate=5)
