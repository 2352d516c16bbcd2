"""`batches`: global batches from samples, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from raypar.errors import DataError
from raypar.train.data.rows import Collate, DatasetRows
from raypar.train.data.sample_stream import StreamedSamples
from raypar.train.data.samples import SampledBatches


def batches(
    dataset: Any,
    global_batch: int,
    *,
    shuffle: bool = False,
    drop_last: bool = True,
    seed: int | None = None,
    num_workers: int = 0,
    collate_fn: Collate | None = None,
) -> Iterable[Any]:
    """Global batches from a data set of samples, as a Trainer's ``data``.

    From a map-style data set (``len(dataset)`` and ``dataset[i]``: torch's, Hugging Face's, a list
    of samples) every rank reads just the rows that it needs, and nothing is sent around. What a
    sample draws from the global random states (a random crop) is a function of seed, epoch and
    index. So batches are the same under every plan and number of worker processes, and a resume
    goes on at once with the next sample.

    A shuffled Ray Dataset is put into Ray's object store, and its rows are read like that too;
    otherwise it is streamed through ``streaming_split``, as are iterables of samples: the first
    rank reads them, and deals out the rows.

    Args:
        dataset: The samples. With a `collate_fn` that does not work row by row, one rank reads.
        global_batch: Samples of one step.
        shuffle: Whether every epoch comes in an order of its own, drawn over the whole data set.
        drop_last: Whether the samples at the end of an epoch that fill no batch are left out; else
            batches run on into the next epoch. Either way each sample is read at most once in an
            epoch.
        seed: Seed of the orders; None takes the trainer's.
        num_workers: Processes that read samples, for each rank that reads; 0 reads in a thread
            beside the training.
        collate_fn: Makes a batch of a list of samples; None stacks tensors, arrays and numbers.

    Raises:
        DataError: `dataset` holds no samples, fewer than one batch, or cannot do what is asked.
    """
    if isinstance(dataset, SampledBatches | StreamedSamples):
        raise DataError("dataset was made by raypar.batches already: pass it as data")
    if _is_of(dataset, "ray.data"):
        from raypar.train.data.ray_data import ray_batches

        return ray_batches(
            dataset, global_batch, shuffle=shuffle, drop_last=drop_last, seed=seed,
            num_workers=num_workers, collate_fn=collate_fn,
        )  # fmt: skip
    if _is_of(dataset, "datasets") and hasattr(dataset, "with_format"):
        # Hugging Face's rows are Python lists unless told otherwise.
        style = getattr(dataset, "format", None)
        if not isinstance(style, dict) or style.get("type") is None:
            dataset = dataset.with_format("torch")
    if is_map_style(dataset):
        return SampledBatches(
            DatasetRows(dataset, collate_fn), global_batch, shuffle, drop_last, seed, num_workers
        )
    if not isinstance(dataset, Iterable):
        raise DataError(
            f"dataset is {type(dataset).__name__}; pass a data set of samples: with __len__ and "
            "__getitem__, an iterable, or a Ray Dataset"
        )
    _refuse_for_streams(dataset, shuffle, drop_last, num_workers)
    return StreamedSamples(dataset, global_batch, collate_fn)


def is_map_style(dataset: Any) -> bool:
    """Whether samples can be read from it by index."""
    return (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, (dict, str, bytes))
    )


def needs_batches(data: Any) -> bool:
    """Whether it holds single samples for sure, so that it is no source of batches."""
    from torch.utils.data import Dataset, IterableDataset

    if _is_of(data, "ray.data"):
        return True
    if _is_of(data, "datasets"):
        return hasattr(data, "with_format")
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def _is_of(value: Any, module: str) -> bool:
    """Whether its class comes from a library, which need not be installed."""
    return any((kind.__module__ + ".").startswith(module + ".") for kind in type(value).__mro__)


def _refuse_for_streams(
    dataset: Iterable[Any], shuffle: bool, drop_last: bool, num_workers: int
) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, Iterator):
        kind = f"the iterator {kind}"
    if shuffle:
        raise DataError(
            f"shuffle=True needs samples that can be read by index, {kind} yields them one by one:"
            " shuffle them where they are made (Hugging Face: dataset.shuffle(seed=0, "
            "buffer_size=10000)) and set shuffle=False"
        )
    if not drop_last:
        raise DataError(
            f"drop_last=False needs samples that can be read by index, {kind} yields them one by "
            "one: set drop_last=True, or make the samples endless"
        )
    if num_workers:
        raise DataError(
            f"num_workers={num_workers} needs samples that can be read by index, {kind} yields "
            "them one by one: pass a torch DataLoader over it as data, and set num_workers there"
        )
