"""Sources of numbered samples, of every kind that may be passed as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from raypar.train.data import batches

Batch = dict[str, torch.Tensor]


def batch_of(ids: list[int]) -> Batch:
    at = torch.tensor(ids)
    return {"x": torch.stack([at, -at], 1).double(), "y": at}


class Numbered(Dataset[Batch]):
    """Sample i holds i; with `noise`, also something random."""

    def __init__(self, length: int, noise: bool = False) -> None:
        self.length = length
        self.noise = noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        self.read.append(index)
        found = {k: v[0] for k, v in batch_of([index]).items()}
        if self.noise:
            found["x"] = found["x"] + torch.rand(2)
        return found


class Stateful:
    """A loader with a state of its own, as torchdata's: it is where its last iterator is."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        self.at = 0
        self._from: int | None = None
        self.read = 0

    def __iter__(self) -> Iterator[Batch]:
        first, self._from = self._from or 0, None
        for start in range(first, self.length - self.size + 1, self.size):
            self.at = start + self.size
            self.read += 1
            yield batch_of(list(range(start, start + self.size)))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": torch.arange(3, dtype=torch.uint8), 7: (b"x", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["generator"].tolist() == [0, 1, 2]
        assert state[7] == (b"x", None)
        self._from = state["at"]


def shuffled_loader(length: int, size: int) -> DataLoader[Batch]:
    return DataLoader(Numbered(length, noise=True), batch_size=size, shuffle=True, drop_last=True)


def by_number(length: int, size: int) -> Callable[..., Iterator[Batch]]:
    """A callable that can start anywhere; every pass has its own order."""

    def made(epoch: int = 0, start_sample: int = 0) -> Iterator[Batch]:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).tolist()
        for at in range(start_sample, length - size + 1, size):
            yield batch_of(order[at : at + size])

    return made


def endless(size: int) -> Iterator[Batch]:
    at = 0
    while True:
        yield batch_of(list(range(at, at + size)))
        at += size


KINDS: dict[str, Callable[[int, int], Any]] = {
    "map": lambda n, b: batches(Numbered(n, noise=True), b, shuffle=True),
    "map, no sample left out": lambda n, b: batches(Numbered(n), b, shuffle=True, drop_last=False),
    "map in order": lambda n, b: batches(Numbered(n), b),
    "samples one by one": lambda n, b: batches((Numbered(n)[i] for i in range(9 * n)), b),
    "list": lambda n, b: [batch_of(list(range(i, i + b))) for i in range(0, n - b + 1, b)],
    "loader": shuffled_loader,
    "iterator": lambda n, b: endless(b),
    "stateful": Stateful,
    "callable that starts anywhere": by_number,
    "callable that makes a loader": lambda n, b: lambda: shuffled_loader(n, b),
}
