"""The feed of a rank that reads its own rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch

from raypar.stages.spec import RankSpec
from raypar.train._read_ahead import ReadAhead, Reading, told
from raypar.train.data import BatchForm, DataPosition, SampledBatches


class OwnRows(ReadAhead):
    """Reads this rank's rows of every batch; no rank waits for another.

    All ranks know by themselves after how many steps the data end.

    Args:
        source: The batches; None on a rank that reads nothing.
        form: What every batch must look like.
        spec: The rank.
        start: Where in the data the first step begins.
        steps: Steps from there to the end of the data; None: endless.
        ahead: Steps that are read ahead.
    """

    def __init__(
        self,
        source: SampledBatches | None,
        form: BatchForm,
        spec: RankSpec,
        start: DataPosition,
        *,
        steps: int | None,
        ahead: int,
    ) -> None:
        super().__init__(self._rows_of, start, depth=ahead)
        self._form = form
        self._spec = spec
        self._left = steps
        self._source = source
        self._batches: Generator[tuple[Any, DataPosition], None, None] | None = None
        places = torch.arange(form.spec.size)
        if spec.replicas > 1:  # the rows that `shard_batch` would cut out
            parts = places.unflatten(0, (spec.microbatches, spec.replicas, -1))
            places = parts[:, spec.replica].flatten()
        self._places = places.numpy()

    def data_state(self, step: int) -> dict[str, Any] | None:
        """See `ReadAhead.data_state`; None from a rank that reads nothing."""
        return None if self._source is None else super().data_state(step)

    def close(self) -> None:
        """See `ReadAhead.close`; ends the worker processes, too."""
        super().close()
        if self._batches is not None:
            with contextlib.suppress(ValueError):  # its thread stands in the user's code
                self._batches.close()

    def _rows_of(self, step: int) -> Reading | None:
        if self._left is not None:
            if self._left == 0:
                return None
            self._left -= 1
        if self._source is None:
            return {}, DataPosition()
        if self._batches is None:
            self._batches = self._source.read(self._start, places=self._places)
        try:
            batch, position = next(self._batches)
            tensors = self._form.tensors(batch, step, len(self._places))
        except BaseException as error:
            raise told(error, step) from error.__cause__
        wanted = [int(name.removeprefix("in:")) for name in self._spec.inputs]
        return {f"in:{i}": tensors[i].contiguous() for i in wanted}, position
