"""What a message transport gives to the groups that share it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch

from raypar.comm._work import Pending

MAX_KEY_BYTES = 4096
"""Longest group path plus tag, in bytes."""

_PATH = re.compile(rb"^/(?:\d+/)*")


class Endpoint(ABC):
    """One rank's end of a mesh of ordered, tagged message streams.

    Every message has a key: the path of the group it belongs to, then its tag. Paths end in ``/``
    and a subgroup's path starts with its parent's, so that one prefix names a group and all its
    subgroups. Messages of equal (source, key) are handed out in the order they were sent.
    """

    rank: int
    size: int

    @abstractmethod
    def send(self, to: int, key: bytes, tensor: torch.Tensor, pending: Pending) -> None:
        """Sends `tensor` (CPU, contiguous); completes `pending` once it may be written again."""

    @abstractmethod
    def post(self, source: int, key: bytes, pending: Pending) -> None:
        """Completes `pending` with the next message of (source, key) not yet asked for."""

    @abstractmethod
    def forget(self, source: int, key: bytes, pending: Pending) -> None:
        """Takes back a `post`, so that a later message is not handed to it."""

    @abstractmethod
    def arrived(self, source: int) -> str:
        """A clause that says what came from `source` lately."""

    @abstractmethod
    def abort(self, path: bytes, reason: str) -> None:
        """Fails everything under `path`, here and, where they can be reached, on other ranks."""

    @abstractmethod
    def aborted(self, path: bytes) -> str | None:
        """Why the group at `path` was aborted, or None."""

    @abstractmethod
    def close(self) -> None:
        """Ends the whole endpoint."""


def is_path(path: bytes) -> bool:
    """Whether this is the path of a group."""
    return _PATH.fullmatch(path) is not None


def readable(key: bytes) -> str:
    """A key as text for people: the tag in quotes, or the collective and its number."""
    rest = _PATH.sub(b"", key, count=1)
    text = rest[1:].decode(errors="replace")
    return repr(text) if rest[:1] == b":" else text
