"""Global batches of samples that come one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import default_collate

from raypar.errors import DataError
from raypar.train.data.form import plain
from raypar.train.data.rows import Collate


class StreamedSamples:
    """Groups the samples of an iterable into batches; made by `raypar.batches`.

    The samples at the end of a pass that fill no batch are left out.

    Args:
        samples: The samples; something that can be iterated again, for more than one epoch.
        global_batch: Samples of one batch.
        collate_fn: Makes a batch of a list of samples; None stacks tensors, arrays and numbers.
    """

    def __init__(self, samples: Any, global_batch: int, collate_fn: Collate | None = None) -> None:
        self._samples = samples
        self._size = global_batch
        self._collate = collate_fn or default_collate
        has_state = hasattr(samples, "state_dict") and hasattr(samples, "load_state_dict")
        if has_state and not _loses_a_buffer(samples):
            self.state_dict = samples.state_dict
            self.load_state_dict = samples.load_state_dict
        if hasattr(samples, "set_epoch"):
            self.set_epoch = samples.set_epoch

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self._samples)
        while len(batch := list(itertools.islice(samples, self._size))) == self._size:
            try:
                made = plain(self._collate(batch))
            except Exception as error:
                raise DataError(
                    f"making a batch of {len(batch)} samples raised {type(error).__name__}: "
                    f"{error}; give raypar.batches(..., collate_fn=...)"
                ) from error
            yield made


def _loses_a_buffer(samples: Any, depth: int = 0) -> bool:
    """Whether it shuffles in a buffer that its ``state_dict`` leaves out, as Hugging Face's does.

    After a resume from such a state, what was in the buffer would never be seen: the samples
    before are read over instead.
    """
    kind = type(samples)
    if not f"{kind.__module__}.".startswith("datasets.") or depth > 16:
        return False
    if "BufferShuffled" in kind.__name__:
        return True
    inner = [v for value in vars(samples).values() for v in _members(value)]
    return any(_loses_a_buffer(value, depth + 1) for value in inner)


def _members(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
