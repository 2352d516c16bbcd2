"""The memory in which values of a tape are computed, and the parts that are cut from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from raypar.sharding.pieces import piece_of
from raypar.sharding.spec import Ranges
from raypar.stages._tape import Region, Tape

CHUNK = 1 << 14
"""How many random numbers are drawn at a time where nobody needs them."""


@dataclass(frozen=True, eq=False)
class Take:
    """A part of a tensor that is wanted.

    Attributes:
        region: The tensor.
        deliver: Called with the part, which shares no memory with anything else.
        ranges: For every dim the ranges that make up the part; None for all of it.
        room: Memory for the part, if it is to lie in some made before: between the large pieces
            that come and go, small ones that stay would leave holes.
    """

    region: Region
    deliver: Callable[[torch.Tensor], None]
    ranges: tuple[Ranges, ...] | None = None
    room: torch.Tensor | None = None


class Storages:
    """The memory of values; the largest piece that is free is used again."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._held: dict[int, torch.UntypedStorage] = {}
        self._own: set[int] = set()
        self._spare: torch.UntypedStorage | None = None
        self._chunks: dict[torch.dtype, torch.Tensor] = {}

    def add(self, value: int, storage: torch.UntypedStorage) -> None:
        """A value that an operator made."""
        self._held[value] = storage

    def of(self, value: int, exact: bool) -> torch.UntypedStorage:
        """The value's storage, made at its first use; `exact` for one of just its size."""
        if value not in self._held:
            self._held[value] = self._make(value, exact)
            self._own.add(value)
        return self._held[value]

    def drop(self, value: int, give_away: bool) -> None:
        """Frees a value, or leaves its memory to who has it now."""
        storage = self._held.pop(value, None)
        if storage is None or value not in self._own or give_away:
            return
        if self._spare is None or self._spare.nbytes() < storage.nbytes():
            self._spare = storage

    def chunk(self, dtype: torch.dtype) -> torch.Tensor:
        """A little memory to draw into."""
        if dtype not in self._chunks:
            self._chunks[dtype] = torch.empty(2 * CHUNK, dtype=dtype)
        return self._chunks[dtype]

    def _make(self, value: int, exact: bool) -> torch.UntypedStorage:
        nbytes = self._tape.nbytes[value]
        first = self._tape.contents.get(value)
        if first is not None:
            return first.untyped_storage().clone()
        spare = self._spare
        if not exact and spare is not None and spare.nbytes() >= nbytes:
            self._spare = None
            storage = spare
        else:
            if not exact:
                self._spare = spare = None  # before a larger one is made
            storage = torch.UntypedStorage(nbytes)
        if value in self._tape.partly:
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,)).zero_()  # type: ignore[call-overload]
        return storage


def cut(
    tensor: torch.Tensor, ranges: tuple[Ranges, ...] | None, room: torch.Tensor | None = None
) -> torch.Tensor:
    """A copy, in `room` if given, of the part of `tensor` that `ranges` name, or of all of it."""
    tensor = tensor.detach()
    if ranges is None:
        return tensor.clone()
    piece = piece_of(ranges)
    if room is None:
        room = torch.empty(piece.shape, dtype=tensor.dtype, device=tensor.device)
    piece.copy_into(tensor, room)
    return room
