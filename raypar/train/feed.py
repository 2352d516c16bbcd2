"""Batches on their way to the ranks: rank 0 reads each one once, and deals it out.

A thread of rank 0's process reads ahead, checks the batch's form, and sends to every other rank
just the inputs and rows that its stages need. Before the tensors of a step goes a header: the step
number, or -1 where the source stopped. So each rank, also one that needs no inputs, ends before
the same step when the data do, with all earlier steps finished.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from raypar.comm.group import Group, TensorSpec, Work
from raypar.errors import CommAbortedError, CommError, DataError
from raypar.stages.batch import shard_batch
from raypar.stages.spec import RankSpec
from raypar.stages.worker import Feed
from raypar.train.data import BatchForm, Data, Opened, RandomState, all_epochs, open_data

AHEAD = 2
"""Steps that are read ahead of the one under way."""

_WAIT_FOR_DATA_S = 24 * 3600.0  # a slow source is no hang; a dead rank 0 is noticed at once
_STOP = -1
_JOIN_S = 1.0


class HeldBatches:
    """Batches that are in this process already, for the in-process backend."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def open(self) -> Iterable[Any]:
        """The batches, from the first."""
        self._opened.random.set()
        return self._opened.batches


class RemadeBatches:
    """Data that are opened again where they are read."""

    def __init__(self, data: Data, seed: int) -> None:
        self._data = data
        self._seed = seed

    def open(self) -> Iterable[Any]:
        """The batches, from the first, in the order that the seed gives."""
        RandomState.of_seed(self._seed).set()
        return open_data(self._data)


class DataFeed:
    """Makes every rank's feed; travels to the ranks.

    Args:
        source: Has ``open()``, which gives the batches; None on ranks that do not read.
        form: What every batch must look like.
        specs: Every rank's spec, by rank.
    """

    def __init__(self, source: Any, form: BatchForm, specs: Sequence[RankSpec]) -> None:
        self._source = source
        self._form = form
        # What cuts a batch, without the programs: this goes to every rank.
        self._specs = tuple(
            dataclasses.replace(
                s, stages=(), instructions=(), posts={}, edges=(), shared={}, constants={},
                shapes={}, model_fn=_none, loss_fn=None, optimizer=_none,
            )
            for s in specs
        )  # fmt: skip

    def for_rank(self, rank: int) -> DataFeed:
        """The feed as `rank` needs it: only rank 0 holds the source."""
        if rank == 0:
            return self
        return DataFeed(None, self._form, [self._specs[rank]])

    def __call__(self, spec: RankSpec, world: Group) -> Feed:
        """The feed of one rank; all ranks call it, since it makes a subgroup of `world`."""
        group = world.subgroup(range(world.size), "data")
        assert group is not None
        group.timeout_s = _WAIT_FOR_DATA_S
        if spec.rank == 0:
            return _Reader(self._source, self._form, self._specs, group)
        mine = next(s for s in self._specs if s.rank == spec.rank)
        return _Receiver(_shard_forms(mine, self._form), group)


def _none(*_: Any) -> Any:
    raise AssertionError("this spec only cuts batches")


def _shard_forms(spec: RankSpec, form: BatchForm) -> dict[str, TensorSpec]:
    """What `shard_batch` will give for `spec`."""
    whole = [
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in zip(form.spec.shapes, form.spec.dtypes, strict=True)
    ]
    return {
        name: TensorSpec(tuple(t.shape), t.dtype) for name, t in shard_batch(spec, whole).items()
    }


class _Receiver:
    """The feed of a rank that is sent its inputs."""

    def __init__(self, forms: dict[str, TensorSpec], group: Group) -> None:
        self._forms = forms
        self._group = group

    def extend(self, until: int) -> None:
        pass

    def take(self, step: int) -> Mapping[str, torch.Tensor] | None:
        header = self._group.irecv(TensorSpec((1,), torch.int64), 0, "header").wait()
        assert header is not None
        found = int(header)
        if found == _STOP:
            return None
        if found != step:
            raise CommError(f"rank 0 sent the batch of step {found}, this rank is at step {step}")
        works = {name: self._group.irecv(form, 0, name) for name, form in self._forms.items()}
        inputs: dict[str, torch.Tensor] = {}
        for name, work in works.items():
            tensor = work.wait()
            assert tensor is not None
            inputs[name] = tensor
        return inputs

    def abort(self, reason: str) -> None:
        self._group.abort(reason)

    def close(self) -> None:
        self._group.close()


class _Reader:
    """The feed of rank 0: reads, keeps its own part, sends the others theirs."""

    def __init__(
        self, source: Any, form: BatchForm, specs: Sequence[RankSpec], group: Group
    ) -> None:
        self._source = source
        self._form = form
        self._specs = specs
        self._group = group
        self._turn = threading.Condition()
        self._ready: deque[Mapping[str, torch.Tensor] | BaseException] = deque()
        self._next: int | None = None  # the step to be read next
        self._until = 0
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._serve, name="raypar-data", daemon=True)

    def extend(self, until: int) -> None:
        with self._turn:
            self._until = max(self._until, until)
            self._turn.notify_all()

    def take(self, step: int) -> Mapping[str, torch.Tensor]:
        with self._turn:
            if self._next is None:
                self._next = step
                self._thread.start()
            self._turn.wait_for(lambda: self._ready or self._ended is not None)
            if not self._ready:
                raise CommAbortedError(f"step {step}: waiting for its batch: {self._ended}")
            item = self._ready.popleft()
            self._turn.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def abort(self, reason: str) -> None:
        with self._turn:
            self._ended = self._ended or reason
            self._turn.notify_all()

    def close(self) -> None:
        self.abort("the feed was closed")
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)  # it may stand in the user's own code: it is a daemon
        self._group.close()

    def _serve(self) -> None:
        works: deque[Work] = deque()
        try:
            batches = all_epochs(self._source.open())
            while (step := self._claim()) is not None:
                self._deal(self._form.tensors(next(batches), step), step, works)
        except DataError as error:
            self._stop(error)
        except CommError as error:
            self._hand(error)  # a rank is gone, or all is being aborted
        except BaseException as error:
            failed = DataError(f"reading the data failed with {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._stop(failed)

    def _claim(self) -> int | None:
        """Waits until the next step may be read; None when the run is over."""
        with self._turn:
            assert self._next is not None
            step = self._next
            self._turn.wait_for(
                lambda: self._ended is not None or (step < self._until and len(self._ready) < AHEAD)
            )
            if self._ended is not None:
                return None
            self._next = step + 1
            return step

    def _deal(self, tensors: list[torch.Tensor], step: int, works: deque[Work]) -> None:
        # A loader may fill one buffer again and again; these are read ahead and sent later.
        tensors = [t.detach().clone() for t in tensors]
        header = torch.tensor([step])
        for spec in self._specs:
            if spec.rank == 0:
                continue
            works.append(self._group.isend(header, spec.rank, "header"))
            for name, part in shard_batch(spec, tensors).items():
                works.append(self._group.isend(part.contiguous(), spec.rank, name))
        while works and works[0].done():
            works.popleft().wait()  # raises what went wrong with it
        self._hand(shard_batch(self._specs[0], tensors))

    def _stop(self, error: DataError) -> None:
        try:
            for spec in self._specs:
                if spec.rank != 0:
                    self._group.isend(torch.tensor([_STOP]), spec.rank, "header")
        except CommError:
            pass  # they are gone or aborted: the data error is what the user needs to see
        self._hand(error)

    def _hand(self, item: Mapping[str, torch.Tensor] | BaseException) -> None:
        with self._turn:
            self._ready.append(item)
            self._turn.notify_all()
