"""Values between a rank's training state and what saves or restores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from raypar.sharding.pieces import Piece

PARAMETER, BUFFER, AVERAGE = "parameter", "buffer", "average"
OPTIMIZER, RANDOM = "optimizer", "random"


class Key(NamedTuple):
    """What a tensor is.

    Attributes:
        kind: ``parameter``, ``buffer``, ``average`` (a moving average of a parameter),
            ``optimizer`` (its state) or ``random`` (the state of a generator).
        slot: The optimizer's state key, or which generator; else empty.
        name: Canonical name of the parameter or buffer; the rank's number for ``random``.
    """

    kind: str
    slot: str
    name: str

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


@dataclass(frozen=True)
class Held:
    """A tensor that a rank speaks for.

    Attributes:
        key: What it is.
        shape: Shape of the whole.
        piece: Which part of the whole `tensor` is.
        tensor: The rank's own memory: it changes with the next step.
        like: Whether it lies like the parameter of its name, and is cut where that is.
    """

    key: Key
    shape: tuple[int, ...]
    piece: Piece
    tensor: torch.Tensor
    like: bool


@dataclass(frozen=True)
class Want:
    """Memory to be filled with a part of a saved tensor."""

    key: Key
    shape: tuple[int, ...]
    piece: Piece
    tensor: torch.Tensor


class SavedForm(NamedTuple):
    """Form of a saved tensor: whole shape, dtype, and `Held.like`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    like: bool


class Saved(Protocol):
    """What was saved, as far as it is needed before any tensor is read."""

    @property
    def world(self) -> int:
        """Ranks of the run that saved it."""

    @property
    def values(self) -> Mapping[str, Any]:
        """`RankState.values` of all ranks as one."""

    def slots(self, kind: str, name: str) -> Mapping[str, SavedForm]:
        """The saved tensors of one name and kind, by slot."""
