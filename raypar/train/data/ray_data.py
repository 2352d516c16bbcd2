"""Ray Data as a source: rows of blocks in the object store, or a stream of them.

Ray Data's own tasks need CPUs that no rank holds: leave some of the cluster's to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from raypar.errors import DataError
from raypar.train.data._order import Indices
from raypar.train.data.form import plain
from raypar.train.data.samples import SampledBatches

Columns = dict[str, npt.NDArray[Any]]
FromColumns = Callable[[Columns], Any]

_HELD = 16  # blocks that a reader keeps mapped


def ray_batches(
    dataset: Any,
    global_batch: int,
    *,
    shuffle: bool,
    drop_last: bool,
    seed: int | None,
    num_workers: int,
    collate_fn: Any,
) -> Any:
    """See `raypar.batches`; `collate_fn` is given a dict of numpy arrays, as in Ray Data.

    Raises:
        DataError: It is no Dataset, or cannot do what is asked.
    """
    from ray.data import DataIterator, Dataset

    if num_workers:
        raise DataError(
            f"num_workers={num_workers}: Ray Data reads in tasks of its own: leave num_workers at "
            "0, and set its parallelism with override_num_blocks or concurrency"
        )
    if isinstance(dataset, DataIterator):
        if shuffle or not drop_last:
            raise DataError(
                f"a {type(dataset).__name__} is a stream of rows: with shuffle={shuffle}, "
                f"drop_last={drop_last} pass the Dataset itself, whose rows can be read by index, "
                "or set shuffle=False, drop_last=True"
            )
        return StreamedRows(dataset, global_batch, collate_fn)
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"dataset is {type(dataset).__name__}; of Ray Data pass a Dataset, or an iterator of "
            "streaming_split(1)"
        )
    # Else rows come in the order in which tasks happen to finish.
    dataset.context.execution_options.preserve_order = True
    if shuffle or not drop_last:
        rows = BlockRows(dataset, collate_fn)
        return SampledBatches(rows, global_batch, shuffle, drop_last, seed)
    return StreamedRows(dataset, global_batch, collate_fn)


class BlockRows:
    """Rows of a Dataset that is in the object store: a rank fetches the blocks of its own rows.

    Args:
        dataset: Is carried out now, into the object store (which spills to disk).
        collate_fn: Makes a batch of columns; None makes tensors of them.
    """

    def __init__(self, dataset: Any, collate_fn: FromColumns | None = None) -> None:
        self._collate = collate_fn
        self._kept = dataset.materialize()  # the blocks live as long as it does
        blocks = [
            (entry.ref, entry.metadata.num_rows)
            for bundle in self._kept.iter_internal_ref_bundles()
            for entry in bundle.blocks
        ]
        self._refs = [ref for ref, rows in blocks if rows]
        self._ends = np.cumsum([rows for _, rows in blocks if rows], dtype=np.int64)
        self._held: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # References keep the blocks alive wherever they are held.
        return {**self.__dict__, "_kept": None, "_held": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, seed: int, epochs: Indices, indices: Indices) -> Any:
        """See `raypar.train.data.rows.Rows`; reading rows draws nothing."""
        block_of = np.searchsorted(self._ends, indices, side="right")
        parts: list[Columns] = []
        order: list[Indices] = []
        for number in np.unique(block_of):
            places = np.flatnonzero(block_of == number)
            first = int(self._ends[number - 1]) if number else 0
            parts.append(self._rows(int(number), indices[places] - first))
            order.append(places)
        back = np.argsort(np.concatenate(order))
        joined = {name: np.concatenate([p[name] for p in parts])[back] for name in parts[0]}
        return _batch(joined, self._collate)

    def _rows(self, number: int, rows: Indices) -> Columns:
        import ray
        from ray.data.block import BlockAccessor

        block = self._held.pop(number, None)
        if block is None:
            block = ray.get(self._refs[number])
        self._held[number] = block  # the newest is last
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        taken = BlockAccessor.for_block(block).take(rows.tolist())
        return cast(Columns, BlockAccessor.for_block(taken).to_numpy())


class StreamedRows:
    """Batches of a Dataset as it is carried out, in the order of its rows.

    Args:
        rows: A Dataset, or an iterator that `streaming_split` made.
        global_batch: Rows of one batch.
        collate_fn: Makes a batch of columns; None makes tensors of them.
    """

    def __init__(self, rows: Any, global_batch: int, collate_fn: FromColumns | None = None) -> None:
        self._rows = rows
        self._size = global_batch
        self._collate = collate_fn
        self._split: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_split": None}

    def head(self, count: int) -> Iterator[Any]:
        """The first `count` batches, without carrying out the rest."""
        limit = getattr(self._rows, "limit", None)
        yield from self._batches(self._rows if limit is None else limit(count * self._size))

    def __iter__(self) -> Iterator[Any]:
        if self._split is None:
            cut = getattr(self._rows, "streaming_split", None)
            # The stream's coordinator is an actor of the process that reads, and ends with it.
            self._split = self._rows if cut is None else cut(1)[0]
        yield from self._batches(self._split)

    def _batches(self, rows: Any) -> Iterator[Any]:
        found = rows.iter_batches(batch_size=self._size, batch_format="numpy", drop_last=True)
        for columns in found:
            yield _batch(columns, self._collate)


def _batch(columns: Columns, collate: FromColumns | None) -> Any:
    if collate is not None:
        return plain(collate(columns))
    found: dict[str, torch.Tensor] = {}
    for name, values in columns.items():
        if values.dtype.kind not in "biuf":
            raise DataError(
                f"column {name!r} of the Ray Dataset holds {values.dtype} values, which make no "
                "tensor: leave it out with dataset.drop_columns or select_columns, bring its rows "
                "to one shape with map_batches, or give raypar.batches(..., collate_fn=...)"
            )
        found[name] = torch.from_numpy(np.array(values))  # Ray's memory is not to be written
    return found
