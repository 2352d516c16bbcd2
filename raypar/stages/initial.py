"""Values that a model begins with in place of those of its seed."""

from __future__ import annotations

from typing import Protocol

import torch

from raypar.sharding.pieces import Piece


class InitialWeights(Protocol):
    """Read on every rank, one part of one tensor at a time; it travels there by value."""

    def has(self, name: str) -> bool:
        """Whether there are values for the parameter or buffer of this canonical name."""

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """Reads a part of a tensor and converts it to the dtype of `out`.

        Args:
            name: Canonical name of a parameter or buffer that `has` knows.
            piece: Which part of it.
            out: Memory on the host, in the form of the part.
        """
