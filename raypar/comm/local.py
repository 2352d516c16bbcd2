"""The in-process backend: threads of one process are the ranks."""

from __future__ import annotations

import torch

from raypar.comm._endpoint import Endpoint
from raypar.comm._exchange import ExchangeGroup
from raypar.comm._inbox import Inbox, aborted_reason
from raypar.comm._work import PeerClosedError, Pending
from raypar.comm.group import DEFAULT_TIMEOUT_S
from raypar.errors import CommAbortedError, CommError


class LocalGroup(ExchangeGroup):
    """A rank of a `LocalWorld`."""


class LocalWorld:
    """Ranks that are threads of this process.

    Args:
        size: Number of ranks.
        name: Name in errors.
        timeout_s: Deadline of every wait, in seconds.
        copy: Whether a message is a copy of what was sent. With False it is the sender's own
            tensor: faster, but then neither side may ever write to it.

    Raises:
        CommError: `size` is below 1.
    """

    def __init__(
        self,
        size: int,
        name: str = "local",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        copy: bool = True,
    ) -> None:
        if size < 1:
            raise CommError(f"{name}: a world has at least 1 rank, not {size}")
        self.size = size
        self.name = name
        self._aborted: dict[bytes, str] = {}
        self._inboxes = [[Inbox(self._aborted) for _ in range(size)] for _ in range(size)]
        self._groups = [
            LocalGroup(
                _LocalEndpoint(self, rank, copy), range(size), name=name, timeout_s=timeout_s
            )
            for rank in range(size)
        ]

    def group(self, rank: int) -> LocalGroup:
        """The group as `rank` sees it; give it to that rank's thread.

        Raises:
            CommError: No such rank.
        """
        if not 0 <= rank < self.size:
            raise CommError(f"{self.name}: the world has ranks 0 to {self.size - 1}, not {rank}")
        return self._groups[rank]

    def abort(self, reason: str = "") -> None:
        """Wakes every rank with CommAbortedError; safe from any thread."""
        self._groups[0].abort(reason)


class _LocalEndpoint(Endpoint):
    def __init__(self, world: LocalWorld, rank: int, copy: bool) -> None:
        self.rank = rank
        self.size = world.size
        self._world = world
        self._copy = copy

    def send(self, to: int, key: bytes, tensor: torch.Tensor, pending: Pending) -> None:
        if self._world._aborted:
            reason = aborted_reason(self._world._aborted, key)
            if reason is not None:
                pending.fail(CommAbortedError, reason)
                return
        gone = self._world._inboxes[self.rank][to].broken
        if gone is not None:
            pending.fail(*gone)
            return
        message = tensor.clone() if self._copy else tensor
        pending.complete()
        self._world._inboxes[to][self.rank].deliver(key, message)

    def post(self, source: int, key: bytes, pending: Pending) -> None:
        self._world._inboxes[self.rank][source].post(key, pending)

    def forget(self, source: int, key: bytes, pending: Pending) -> None:
        self._world._inboxes[self.rank][source].forget(key, pending)

    def arrived(self, source: int) -> str:
        return self._world._inboxes[self.rank][source].arrived()

    def abort(self, path: bytes, reason: str) -> None:
        self._world._aborted.setdefault(path, reason)
        for row in self._world._inboxes:
            for inbox in row:
                inbox.abort(path, self._world._aborted[path])

    def aborted(self, path: bytes) -> str | None:
        return aborted_reason(self._world._aborted, path)

    def close(self) -> None:
        reason = f"rank {self.rank} of {self._world.name} has closed its end"
        for rank, row in enumerate(self._world._inboxes):
            if rank != self.rank:
                row[self.rank].break_off(PeerClosedError, reason)
