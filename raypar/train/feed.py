"""Batches on their way to the ranks.

Where raypar draws the samples itself (`raypar.batches` over what can be read by index), each rank
that has inputs reads its own rows, and nothing is sent. Any other source is read once, by a thread
of rank 0's process: it checks each batch's form, and sends to every other rank just the inputs and
rows that its stages need. Before the tensors of a step goes a header: the step number, or -1 where
the source stopped. So each rank, also one that needs no inputs, ends before the same step when the
data do, with all earlier steps finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from raypar.comm.group import Group, TensorSpec, Work
from raypar.errors import CommError
from raypar.stages.batch import shard_batch
from raypar.stages.spec import RankSpec
from raypar.stages.worker import Feed
from raypar.train._own_rows import OwnRows
from raypar.train._read_ahead import Inputs, ReadAhead, Reading, told
from raypar.train.data import BatchForm, Data, DataPosition, Opened, RandomState, open_data
from raypar.train.data.samples import SampledBatches
from raypar.train.data.stream import Mark

AHEAD = 2
"""Steps that are read ahead of the one under way, unless a feed is told otherwise."""

_WAIT_FOR_DATA_S = 24 * 3600.0  # a slow source is no hang; a dead rank 0 is noticed at once
_STOP = -1
_FRESH = DataPosition()


Batches = Generator[tuple[Any, Mark | DataPosition], None, None]


class Source(Protocol):
    """Where the processes that read get the batches from."""

    @property
    def sampled(self) -> SampledBatches | None:
        """The batches, where each rank may read its own rows."""

    def read(self, size: int, start: DataPosition = _FRESH, epochs: int | None = None) -> Batches:
        """As `Opened.read`."""


class HeldBatches:
    """Batches that are in this process already, for the in-process backend."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    @property
    def sampled(self) -> SampledBatches | None:
        """See `Source`."""
        return self._opened.sampled if self._opened.by_rows else None

    def read(self, size: int, start: DataPosition = _FRESH, epochs: int | None = None) -> Batches:
        """See `Source`."""
        return self._opened.read(size, start, epochs)


class RemadeBatches:
    """Data that are opened again where they are read.

    Args:
        data: What the user passed.
        seed: Seed of the loader's random order.
        accumulate: Batches in a row that make one global batch.
        batch_dims: As for `raypar.capture`.
        by_rows: Whether each rank may read its own rows (`Opened.by_rows`).
    """

    def __init__(
        self,
        data: Any,
        seed: int,
        accumulate: int = 1,
        batch_dims: Any = None,
        by_rows: bool = False,
    ) -> None:
        self._data = data
        self._seed = seed
        self._accumulate = accumulate
        self._batch_dims = batch_dims
        self._by_rows = by_rows

    @property
    def sampled(self) -> SampledBatches | None:
        """See `Source`."""
        if not self._by_rows:
            return None
        before = RandomState.now()
        try:
            return self._opened().sampled
        finally:
            before.set()

    def read(self, size: int, start: DataPosition = _FRESH, epochs: int | None = None) -> Batches:
        """See `Source`."""
        return self._opened().read(size, start, epochs)

    def _opened(self) -> Opened:
        random = RandomState.of_seed(self._seed)
        random.set()  # a callable may draw, too
        data = self._given()
        made = open_data(data, self._seed)
        one_shot = isinstance(made, Iterator)
        return Opened(None, made, one_shot, random, data, self._accumulate, self._batch_dims)

    def _given(self) -> Data:
        found: Data = self._data
        return found


class DataFeed:
    """Makes every rank's feed; travels to the ranks.

    A rank's feed has two methods more than others, which all ranks are called with between steps.
    ``data_state(step)`` gives the position after the batch of ``step - 1`` (`DataPosition.to_json`)
    on ranks that read, among them rank 0, and None on others. ``prefetch(step, until)`` reads ahead
    from `step` on, before the first step.

    Args:
        source: Where the batches come from.
        form: What every batch must look like.
        specs: Every rank's spec, by rank.
        start: Where in the data the first step that is asked for begins.
        epochs: The data end after so many passes, counted from the first of the run; None repeats
            them as long as steps are asked for.
        ahead: Steps that are read ahead.
        name: Tells this feed from others of the same run (an evaluation's).
    """

    def __init__(
        self,
        source: Source,
        form: BatchForm,
        specs: Sequence[RankSpec],
        *,
        start: DataPosition = _FRESH,
        epochs: int | None = None,
        ahead: int = AHEAD,
        name: str = "data",
    ) -> None:
        self._source: Source | None = source
        self._form = form
        self._start = start
        self._epochs = epochs
        self._ahead = ahead
        self._name = name
        sampled = source.sampled
        self._by_rows = sampled is not None
        self._steps = None if sampled is None or epochs is None else sampled.steps_in(epochs, start)
        # What cuts a batch, without the programs: this goes to every rank.
        self._specs = tuple(
            dataclasses.replace(
                s, stages=(), instructions=(), posts={}, edges=(), shared={}, constants={},
                shapes={}, model_fn=_none, loss_fn=None, optimizer=_none,
            )
            for s in specs
        )  # fmt: skip

    def for_rank(self, rank: int) -> DataFeed:
        """The feed as `rank` needs it: with the source only where it is read."""
        if rank == 0:
            return self
        cut = object.__new__(DataFeed)
        cut.__dict__.update(self.__dict__)
        cut._specs = tuple(s for s in self._specs if s.rank == rank)
        if not (self._by_rows and cut._specs[0].inputs):
            cut._source = None
        return cut

    def __call__(self, spec: RankSpec, world: Group) -> Feed:
        """The feed of one rank; all ranks call it, since it may make a subgroup of `world`."""
        mine = next(s for s in self._specs if s.rank == spec.rank)
        if self._by_rows:
            sampled = None if self._source is None else self._source.sampled
            return OwnRows(
                sampled, self._form, mine, self._start, steps=self._steps, ahead=self._ahead
            )
        group = world.subgroup(range(world.size), self._name)
        assert group is not None
        group.timeout_s = _WAIT_FOR_DATA_S
        if spec.rank != 0:
            return _Receiver(_shard_forms(mine, self._form), group)
        assert self._source is not None, "rank 0 reads"
        batches = _Lazily(self._source, self._form.spec.size, self._start, self._epochs)
        return _Dealer(batches, self._form, self._specs, group, self._start, self._ahead)


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


class _Lazily:
    """A source's batches, opened by the thread that reads them."""

    def __init__(self, source: Source, size: int, start: DataPosition, epochs: int | None) -> None:
        self._source = source
        self._arguments = (size, start, epochs)
        self._found: Batches | None = None

    def next(self) -> tuple[Any, Mark | DataPosition] | None:
        """The next batch with the position after it, or None at the end."""
        if self._found is None:
            self._found = self._source.read(*self._arguments)
        return next(self._found, None)

    def close(self) -> None:
        """Ends what the batches hold: worker processes, a stream of Ray Data."""
        if self._found is not None:
            with contextlib.suppress(ValueError):  # its thread stands in the user's code
                self._found.close()


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

    def prefetch(self, step: int, until: int) -> None:
        pass

    def data_state(self, step: int) -> None:
        return None

    def abort(self, reason: str) -> None:
        self._group.abort(reason)

    def close(self) -> None:
        self._group.close()


class _Dealer:
    """The feed of rank 0 where it reads for all: keeps its own part, sends the others theirs."""

    def __init__(
        self,
        batches: _Lazily,
        form: BatchForm,
        specs: Sequence[RankSpec],
        group: Group,
        start: DataPosition,
        ahead: int,
    ) -> None:
        self._batches = batches
        self._form = form
        self._specs = specs
        self._group = group
        self._works: deque[Work] = deque()
        self._reader = ReadAhead(self._read, start, depth=ahead)
        self.extend = self._reader.extend
        self.take = self._reader.take
        self.prefetch = self._reader.prefetch
        self.data_state = self._reader.data_state
        self.abort = self._reader.abort

    def close(self) -> None:
        self._reader.close()
        self._batches.close()
        self._group.close()

    def _read(self, step: int) -> Reading | None:
        try:
            found = self._batches.next()
            if found is None:
                self._stop()
                return None
            batch, mark = found
            return self._deal(self._form.tensors(batch, step), step), mark
        except CommError:
            raise  # a rank is gone, or all is being aborted
        except BaseException as error:
            self._stop()
            raise told(error, step) from error.__cause__

    def _deal(self, tensors: list[torch.Tensor], step: int) -> Inputs:
        # A loader may fill one buffer again and again; these are read ahead and sent later.
        tensors = [t.detach().clone() for t in tensors]
        header = torch.tensor([step])
        for spec in self._specs:
            if spec.rank == 0:
                continue
            self._works.append(self._group.isend(header, spec.rank, "header"))
            for name, part in shard_batch(spec, tensors).items():
                self._works.append(self._group.isend(part.contiguous(), spec.rank, name))
        while self._works and self._works[0].done():
            self._works.popleft().wait()  # raises what went wrong with it
        return shard_batch(self._specs[0], tensors)

    def _stop(self) -> None:
        try:
            for spec in self._specs:
                if spec.rank != 0:
                    self._group.isend(torch.tensor([_STOP]), spec.rank, "header")
        except CommError:
            pass  # they are gone or aborted: the data error is what the user needs to see
