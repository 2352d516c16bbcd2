"""Weights: tensors under names, of which any part can be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece, whole_piece
from raypar.train.checkpoint import Checkpoint
from raypar.train.checkpoint.reading import Reader


class Form(NamedTuple):
    """Form of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


class Weights(ABC):
    """A place that holds a model's tensors; it travels to ranks by value, without the tensors.

    Attributes:
        where: Its path or URL.
        names: Every name → the name that its tensor has in `forms`: tied names share one.
        forms: Every tensor.
    """

    where: str
    names: Mapping[str, str]
    forms: Mapping[str, Form]

    @abstractmethod
    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """Reads a part of a tensor.

        Args:
            name: Of `names`.
            piece: Which part.
            out: Memory on the host in the form of the part, of any dtype.

        Raises:
            CheckpointError: It cannot be read.
        """

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in its own dtype."""
        form = self.forms[self.names[name]]
        out = torch.empty(form.shape, dtype=form.dtype)
        self.fill(name, whole_piece(form.shape), out)
        return out


class CheckpointWeights(Weights):
    """The model of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        average: The moving average in place of the weights.

    Attributes:
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: It is damaged, or has no average.
    """

    def __init__(self, checkpoint: Checkpoint, *, average: bool = False) -> None:
        checkpoint.check_sizes()
        self.checkpoint = checkpoint
        self._reader: Reader | None = None
        tensors = checkpoint.model_tensors(average=average)
        self.where = checkpoint.path
        self.names = dict(checkpoint.index.names)
        # A canonical name is itself a name of the model; a damaged index may lack it.
        of = {canonical: tensors[name] for name, canonical in self.names.items()}
        self.forms = {name: Form(t.shape, t.dtype) for name, t in of.items()}
        self._keys = {name: t.key for name, t in of.items()}

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """See `Weights.fill`; every byte is checked."""
        if self._reader is None:
            made = self.checkpoint
            self._reader = Reader(made.storage, made.name, made.index)
        self._reader.fill(self._keys[self.names[name]], piece, out, converts=True)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}  # it holds blocks that were read


def refuse_existing(path: str, exists: bool) -> None:
    """Raises where something would be overwritten.

    Raises:
        CheckpointError: There is something.
    """
    if exists:
        raise CheckpointError(f"{path!r} exists already: give another name, or remove it first")
