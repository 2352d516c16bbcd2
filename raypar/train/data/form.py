"""What every batch must look like: the form of the example."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec


def plain(batch: Any) -> Any:
    """A batch as one of dicts and tensors.

    A mapping type that pytrees do not know (Hugging Face's BatchEncoding) becomes a dict, and NumPy
    arrays become tensors of their dtype: what a loader's default collate function does to samples.

    Raises:
        DataError: An array has a dtype that no tensor has (texts, objects).
    """
    if not isinstance(batch, dict) and hasattr(batch, "items") and hasattr(batch, "keys"):
        batch = dict(batch.items())
    if not any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(batch)):
        return batch
    return pytree.tree_map_only(np.ndarray, _tensor_of, batch)


def _tensor_of(array: Any) -> torch.Tensor:
    try:
        # Negative strides, foreign byte orders and memory that is only to be read need a copy.
        usable = array.flags.writeable and all(n >= 0 for n in array.strides)
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(array if usable and array.dtype.isnative else array.astype(native))
    except TypeError as error:
        raise DataError(
            f"a batch holds a NumPy array of dtype {array.dtype} and shape {array.shape}, which "
            "has no tensor: yield numbers, for example texts as the numbers of their tokens"
        ) from error


def leaves_as(structure: Any, batch: Any) -> list[Any] | None:
    """The leaves of a batch of that structure; None where it has another.

    A list and a tuple of arguments mean the same: a DataLoader makes lists where samples are
    tuples.
    """
    forms = (list(batch), tuple(batch)) if type(batch) in (list, tuple) else (batch,)
    for form in forms:
        leaves, found = pytree.tree_flatten(form)
        if found == structure:
            return leaves
    return None


class BatchForm:
    """The form that every batch must have: the example's.

    Args:
        example: The example batch.
        batch_dims: As for `raypar.capture`.
    """

    def __init__(self, example: Any, batch_dims: Any = None) -> None:
        self.spec = BatchSpec.of(example, batch_dims)
        paths, _ = pytree.tree_flatten_with_path(example)
        self.names = tuple("batch" + pytree.keystr(path) for path, _ in paths)

    def __getstate__(self) -> dict[str, Any]:
        # A tree of leaf numbers travels in place of torch's tree spec, whose own pickling warns.
        tree = pytree.tree_unflatten(range(len(self.names)), self.spec.structure)
        return {
            "names": self.names,
            "tree": tree,
            "spec": dataclasses.replace(self.spec, structure=None),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.names = state["names"]
        _, structure = pytree.tree_flatten(state["tree"])
        self.spec = dataclasses.replace(state["spec"], structure=structure)

    def tensors(self, batch: Any, step: int, size: int | None = None) -> list[torch.Tensor]:
        """The tensor leaves of the batch of `step`.

        Args:
            batch: The batch, or some of its samples.
            step: Its step, for errors.
            size: Samples that it must have; default: the example's.

        Raises:
            DataError: Structure, a shape, a dtype or a constant differs from the example's; the
                text names the leaf.
        """
        batch = plain(batch)
        leaves = leaves_as(self.spec.structure, batch)
        if leaves is None:
            _, structure = pytree.tree_flatten(batch)
            raise DataError(
                f"the batch of step {step} has another structure than the first batch: expected "
                f"{pytree.treespec_pprint(self.spec.structure)}, found "
                f"{pytree.treespec_pprint(structure)}"
            )
        where = dict(zip(self.spec.tensor_leaves, range(len(self.spec.shapes)), strict=True))
        wanted = self.spec.tensor_specs(self.spec.size if size is None else size)
        for i, leaf in enumerate(leaves):
            if i in where:
                self._check_tensor(leaf, i, wanted[where[i]], self.spec.batch_dims[where[i]], step)
            elif not _equal(leaf, self.spec.constants[i]):
                raise DataError(
                    f"{self.names[i]} of step {step} is {leaf!r}, in the first batch it was "
                    f"{self.spec.constants[i]!r}: values that are no tensors are compiled into the "
                    "model; pass a tensor if it changes"
                )
        return [leaves[i] for i in self.spec.tensor_leaves]

    def _check_tensor(
        self,
        leaf: Any,
        at: int,
        wanted: tuple[tuple[int, ...], torch.dtype],
        dim: int | None,
        step: int,
    ) -> None:
        shape, dtype = wanted
        name = self.names[at]
        if not isinstance(leaf, torch.Tensor):
            raise DataError(
                f"{name} of step {step} is {type(leaf).__name__}, in the first batch it was a "
                f"tensor of shape {shape}"
            )
        found = tuple(leaf.shape)
        if found != shape:
            hint = ""
            if dim is not None and len(found) == len(shape) and found[dim] != shape[dim]:
                hint = (
                    f": {found[dim]} samples instead of {shape[dim]}; for a ragged last batch pass "
                    "drop_last=True to the DataLoader, or raypar.batches(dataset, "
                    f"global_batch={shape[dim]}, drop_last=False), whose batches run on into the "
                    "next epoch"
                )
            elif len(found) == len(shape):
                at = next(i for i, size in enumerate(shape) if found[i] != size)
                hint = (
                    ". Shapes are compiled in: pad all samples to one length, such as "
                    f"collate_fn=raypar.PadTo({max(found[at], shape[at])}) of the DataLoader or of "
                    "raypar.batches"
                )
            raise DataError(
                f"{name} of step {step} has shape {found}, expected {shape} as in the first batch"
                f"{hint}"
            )
        if leaf.dtype != dtype:
            raise DataError(
                f"{name} of step {step} has dtype {leaf.dtype}, expected {dtype} as in the first "
                "batch"
            )


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # a comparison of arrays has no single truth value
        return a is b
