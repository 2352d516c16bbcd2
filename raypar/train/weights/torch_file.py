"""A state dict that `torch.save` wrote, read without running anything that is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece
from raypar.train.checkpoint.format import DTYPES
from raypar.train.weights.weights import Form, Weights


class TorchFileWeights(Weights):
    """The tensors of a state dict; they are mapped, and come into memory as they are read.

    Args:
        path: The file.

    Raises:
        CheckpointError: It holds something else than tensors under names, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zip and torch each have their own kinds
            first = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{self.where} cannot be read as a state dict: {type(error).__name__}: "
                f"{first:.300}; write one that holds tensors alone, with "
                "torch.save(model.state_dict(), path)"
            ) from None
        self._tensors = _checked(found, self.where)
        kept: dict[object, str] = {}
        self.names = {
            name: kept.setdefault(_memory(tensor) if tensor.numel() else name, name)
            for name, tensor in self._tensors.items()
        }
        self.forms = {
            name: Form(tuple(self._tensors[name].shape), self._tensors[name].dtype)
            for name in kept.values()
        }

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """See `Weights.fill`."""
        piece.copy_into(self._tensors[name], out)


def _checked(found: object, where: str) -> Mapping[str, torch.Tensor]:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} holds {type(found).__name__}, no tensors under names")
    for name, value in found.items():
        good = isinstance(value, torch.Tensor) and value.layout is torch.strided
        if not isinstance(name, str) or not good or value.dtype not in DTYPES.values():
            held = f"{value.dtype}, {value.layout}" if isinstance(value, torch.Tensor) else value
            raise CheckpointError(
                f"{where} holds {type(value).__name__} {held!r:.60} under {name!r:.80}; a state "
                "dict holds plain tensors alone: write one with torch.save(model.state_dict(), "
                "path)"
            )
    return found


def _memory(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory."""
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
