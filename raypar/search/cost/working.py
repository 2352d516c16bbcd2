"""Bytes that programs hold while they run, counted as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from raypar.compat import TorchDispatchMode, pytree


def most_held(
    run: Callable[[], object], given: Iterable[torch.Tensor], device: torch.device
) -> int:
    """Most bytes that exist at once while `run` runs, besides what was there before.

    A GPU's allocator counts itself. On a CPU every storage that an op makes is followed until it
    is freed; what is inside of one op is not seen.

    Args:
        run: What is watched.
        given: Tensors that are there before.
        device: Where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Storages(given) as storages:
        run()
    return storages.most


class _Storages(TorchDispatchMode):  # type: ignore[misc]
    """Follows every new storage.

    Attributes:
        most: Most bytes that were there at once.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._given = {x.untyped_storage().data_ptr() for x in given}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        at, nbytes = storage.data_ptr(), storage.nbytes()
        if at == 0 or at in self._given or at in self._known:
            return

        def freed(_: object) -> None:
            del self._known[at]
            self._now -= nbytes

        self._known[at] = weakref.ref(storage, freed)
        self._now += nbytes
        self.most = max(self.most, self._now)
