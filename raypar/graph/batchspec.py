"""The form of one global batch: which leaves are tensors, and where each one's samples lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raypar.compat import pytree
from raypar.errors import CaptureError


@dataclass(frozen=True)
class BatchSpec:
    """Structure of an example batch.

    Attributes:
        structure: Pytree structure of the batch.
        constants: Non-tensor leaves by leaf index.
        shapes: Shape of every tensor leaf at `size` samples.
        dtypes: Dtype of every tensor leaf.
        tensor_leaves: Leaf index of every tensor leaf.
        batch_dims: Batch dim of every tensor leaf, or None for broadcast.
        size: Samples in the example batch.
    """

    structure: Any
    constants: dict[int, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    tensor_leaves: tuple[int, ...]
    batch_dims: tuple[int | None, ...]
    size: int

    @classmethod
    def of(cls, batch: Any, batch_dims: Any = None) -> BatchSpec:
        """Reads the form of `batch`.

        Args:
            batch: One global batch (any pytree).
            batch_dims: Same structure, with an int or None for every tensor leaf; or one int for
                all of them; default: dim 0 of every tensor whose dim 0 is the batch size, which is
                dim 0 of the first tensor that has dims.

        Raises:
            CaptureError: No tensors, no samples, or batch dims that do not fit.
        """
        leaves, structure = pytree.tree_flatten(batch)
        where = tuple(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
        tensors = [leaves[i] for i in where]
        if not any(t.ndim for t in tensors):
            kinds = sorted({type(leaf).__name__ for leaf in leaves}) or ["nothing"]
            raise CaptureError(
                f"example_batch holds no tensor with dims, it holds {', '.join(kinds)}; give one "
                "global batch: a tensor (of an array: torch.from_numpy(array)), a tuple of "
                "positional arguments, a dict of keyword arguments, or (tuple, dict)"
            )
        dims = _dims(tensors, batch, batch_dims)
        sizes = {t.shape[d] for t, d in zip(tensors, dims, strict=True) if d is not None}
        if len(sizes) != 1:
            raise CaptureError(
                f"the batch dims name different batch sizes {sorted(sizes)}; shapes "
                f"{[tuple(t.shape) for t in tensors]}, batch_dims {dims}: pass batch_dims with "
                "one int (or None for broadcast) for every tensor"
            )
        if 0 in sizes:
            raise CaptureError(
                f"the batch holds no sample: shapes {[tuple(t.shape) for t in tensors]}, batch "
                f"dims {dims}; give a batch of at least one sample"
            )
        return cls(
            structure,
            {i: x for i, x in enumerate(leaves) if i not in where},
            tuple(tuple(t.shape) for t in tensors),
            tuple(t.dtype for t in tensors),
            where,
            dims,
            sizes.pop(),
        )

    def tensor_specs(self, size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of every tensor leaf for a batch of `size` samples."""
        return [
            (tuple(size if i == d else n for i, n in enumerate(shape)), dtype)
            for shape, dtype, d in zip(self.shapes, self.dtypes, self.batch_dims, strict=True)
        ]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The batch with `tensors` in place of its tensor leaves."""
        leaves = dict(self.constants)
        leaves.update(zip(self.tensor_leaves, tensors, strict=True))
        return pytree.tree_unflatten([leaves[i] for i in range(len(leaves))], self.structure)


def _dims(tensors: list[torch.Tensor], batch: Any, batch_dims: Any) -> tuple[int | None, ...]:
    if batch_dims is None:
        size = next(t for t in tensors if t.ndim).shape[0]
        return tuple(0 if t.ndim and t.shape[0] == size else None for t in tensors)
    if isinstance(batch_dims, int):
        dims: list[int | None] = [batch_dims] * len(tensors)
    else:
        given = pytree.tree_leaves(batch_dims, is_leaf=lambda x: x is None)
        count = len(pytree.tree_leaves(batch, is_leaf=lambda x: x is None))
        if len(given) == count != len(tensors):
            leaves = pytree.tree_leaves(batch, is_leaf=lambda x: x is None)
            given = [g for g, x in zip(given, leaves, strict=True) if isinstance(x, torch.Tensor)]
        if len(given) != len(tensors):
            raise CaptureError(
                f"batch_dims has {len(given)} entries, the batch has {len(tensors)} tensors"
            )
        dims = list(given)
    for i, (t, d) in enumerate(zip(tensors, dims, strict=True)):
        if d is not None and not (isinstance(d, int) and -t.ndim <= d < t.ndim):
            raise CaptureError(
                f"batch_dims[{i}] is {d!r}, but tensor {i} has shape {tuple(t.shape)}"
            )
    return tuple(None if d is None else d % t.ndim for t, d in zip(tensors, dims, strict=True))
