"""Several batches as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec
from raypar.train.data.form import BatchForm, plain


def joined(batches: Sequence[Any], batch_dims: Any = None) -> Any:
    """The batch that holds the samples of all of `batches`, in order.

    Tensors are concatenated along their batch dims; what has none (broadcast) must be equal in all.
    So k batches make the global batch whose step is that of k accumulated backward passes.

    Args:
        batches: At least one batch, all of one form.
        batch_dims: As for `raypar.capture`.

    Raises:
        DataError: The forms differ, or a broadcast tensor does.
    """
    first = plain(batches[0])
    form = BatchForm(first, batch_dims)
    parts = [form.tensors(batch, number) for number, batch in enumerate(batches)]
    whole: list[torch.Tensor] = []
    for at, dim in enumerate(form.spec.batch_dims):
        column = [tensors[at] for tensors in parts]
        if dim is not None:
            whole.append(torch.cat(column, dim))
            continue
        if not all(torch.equal(column[0], other) for other in column[1:]):
            raise DataError(
                f"accumulate={len(batches)}: {form.names[form.spec.tensor_leaves[at]]} has no "
                f"batch dim (shape {tuple(column[0].shape)}, batch of {form.spec.size} samples) "
                "and differs between the batches that are to be one: name its batch dim in "
                "batch_dims, or set accumulate=1"
            )
        whole.append(column[0])
    return form.spec.rebuild(whole)


def rows_of(batch: Any, spec: BatchSpec, first: int, count: int) -> list[torch.Tensor]:
    """The tensors of samples ``first`` to ``first + count - 1`` of a batch of form `spec`."""
    leaves = pytree.tree_leaves(plain(batch))
    tensors = [leaves[i] for i in spec.tensor_leaves]
    return [
        t if dim is None else t.narrow(dim, first, count)
        for t, dim in zip(tensors, spec.batch_dims, strict=True)
    ]
