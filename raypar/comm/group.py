"""The interface every communication backend implements.

Tensors are CPU or CUDA torch tensors; every call has a deadline and a name, so that a hang is
reported as what it is. Calls that return a `Work` begin at once and finish in the background: the
tensors they were given must not be written before `wait()` returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DEFAULT_TIMEOUT_S = 60.0


class Work(ABC):
    """A transfer or collective under way."""

    @abstractmethod
    def wait(self) -> torch.Tensor | None:
        """Blocks until it is done; for a receive, returns the tensor.

        Raises:
            CommTimeoutError: The deadline passed; the text names the call, the peers and the time.
            CommAbortedError: The group was aborted.
            CommError: A peer is gone.
        """

    @abstractmethod
    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""


class Ready(Work):
    """A call that was over when it returned."""

    __slots__ = ("_value",)

    def __init__(self, value: torch.Tensor | None = None) -> None:
        self._value = value

    def wait(self) -> torch.Tensor | None:
        """See `Work`."""
        return self._value

    def done(self) -> bool:
        """See `Work`."""
        return True


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype a receiver expects; a message of another form is a CommError."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Group(ABC):
    """A set of ranks that exchange tensors.

    `rank` and `size` count within the group. Point-to-point messages are matched by (source, tag)
    in FIFO order; a send never waits for its receive to be posted.
    """

    name: str
    rank: int
    size: int
    timeout_s: float

    @abstractmethod
    def isend(self, tensor: torch.Tensor, to: int, tag: str) -> Work:
        """Begins to send `tensor`; it may be written again once `wait()` returned."""

    @abstractmethod
    def irecv(self, spec: TensorSpec, source: int, tag: str) -> Work:
        """Begins to receive the next message of (source, tag); `wait()` returns it."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, *, op: str = "sum", name: str = "") -> Work:
        """In place; `op` is ``sum``, ``max`` or ``min``."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, *, name: str = "") -> list[torch.Tensor]:
        """Everyone's tensor, in rank order; shapes and dtypes are equal."""

    @abstractmethod
    def reduce_scatter(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> torch.Tensor:
        """Sum over ranks of everyone's `tensors[rank]`; the tensors have equal shapes."""

    def ireduce_scatter(
        self, tensors: Sequence[torch.Tensor], *, into: torch.Tensor | None = None, name: str = ""
    ) -> Work:
        """Begins a `reduce_scatter`; `wait()` returns the sum.

        A backend without a background form of it does it at once.

        Args:
            tensors: One per rank, of equal shapes.
            into: Contiguous memory for the sum, which may be ``tensors[rank]``; None for new.
            name: Name in errors.
        """
        found = self.reduce_scatter(tensors, name=name)
        return Ready(found if into is None else into.copy_(found))

    def iall_gather(self, tensor: torch.Tensor, *, name: str = "") -> Work:
        """Begins an `all_gather`; `wait()` returns all tensors, stacked in rank order.

        A backend without a background form of it does it at once.
        """
        return Ready(torch.stack(self.all_gather(tensor, name=name)))

    @abstractmethod
    def all_to_all(self, tensors: Sequence[torch.Tensor], *, name: str = "") -> list[torch.Tensor]:
        """Sends `tensors[i]` to rank i; returns what each rank sent here, in rank order."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, *, root: int, name: str = "") -> None:
        """In place on every rank but `root`."""

    @abstractmethod
    def barrier(self, *, name: str = "") -> None:
        """Returns once every rank has called it."""

    @abstractmethod
    def subgroup(self, ranks: Sequence[int], name: str) -> Group | None:
        """A group of some of this group's ranks; None for a rank that is not in it.

        Every rank of the parent calls it, in the same order.
        """

    @abstractmethod
    def abort(self, reason: str = "") -> None:
        """Makes every call under way and to come raise CommAbortedError.

        The other ranks are told as far as they can be reached. Safe from any thread, and to call
        twice.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases threads and sockets; the group cannot be used again."""
