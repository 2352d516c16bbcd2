"""Reading a user's data: what may be passed, how it repeats, and what each batch must look like."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypar.compat import pytree
from raypar.errors import DataError
from raypar.graph.batchspec import BatchSpec

Data = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches: an iterable (a list, a `torch.utils.data.DataLoader`, ...), an iterator, or a callable
that returns one of them."""


@dataclass(frozen=True)
class RandomState:
    """The global random states that loaders draw from."""

    torch_state: torch.Tensor
    numpy_state: Any
    python_state: Any

    @classmethod
    def now(cls) -> RandomState:
        """Reads them."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    @classmethod
    def of_seed(cls, seed: int) -> RandomState:
        """The states that `seed` gives, leaving the present ones alone."""
        before = cls.now()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        found = cls.now()
        before.set()
        return found

    def set(self) -> None:
        """Makes these the present states."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)


@dataclass(frozen=True)
class Opened:
    """A user's data after one look at it.

    Attributes:
        example: The first batch.
        batches: All batches, the first among them.
        one_shot: Whether `batches` can be gone through only once.
        random: Random states to set before `batches` is gone through.
    """

    example: Any
    batches: Iterable[Any]
    one_shot: bool
    random: RandomState


def open_data(data: Data) -> Iterable[Any]:
    """The iterable behind what a user passed.

    Raises:
        DataError: It is none, or the callable raised.
    """
    made: Any = data
    if callable(data) and not isinstance(data, Iterable):
        try:
            made = data()
        except Exception as error:
            raise DataError(
                f"data() raised {type(error).__name__}: {error}; it is called without arguments "
                "and must return an iterable of batches"
            ) from error
    if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
        what = "data() returned" if made is not data else "data is"
        raise DataError(
            f"{what} {type(made).__name__}; pass an iterable of global batches, a DataLoader, or a "
            "callable that returns one"
        )
    if isinstance(made, (torch.Tensor, str, bytes, dict)):
        raise DataError(
            f"data is one {type(made).__name__}; pass an iterable of global batches, for example "
            "[batch] to train on one batch again and again"
        )
    return made  # type: ignore[no-any-return]


def peek(data: Data, seed: int) -> Opened:
    """Opens `data` and reads its first batch, with the random states of `seed`.

    Raises:
        DataError: It is no data, is empty, or raised.
    """
    before = RandomState.now()
    start = RandomState.of_seed(seed)
    start.set()
    try:
        made = open_data(data)
        iterator = _iterator(made)
        try:
            first = next(iterator)
        except StopIteration:
            raise DataError("the data source is empty: it holds no batch") from None
        except DataError:
            raise
        except Exception as error:
            raise _raised(error, 0) from error
        if iterator is made:
            rest = itertools.chain([first], iterator)
            return Opened(plain(first), rest, True, RandomState.now())
        return Opened(plain(first), made, False, start)
    finally:
        before.set()


def plain(batch: Any) -> Any:
    """A batch whose mapping type pytrees do not know (Hugging Face's BatchEncoding) as a dict."""
    if not isinstance(batch, dict) and hasattr(batch, "items") and hasattr(batch, "keys"):
        return dict(batch.items())
    return batch


def all_epochs(batches: Iterable[Any]) -> Iterator[Any]:
    """Goes through `batches` again and again, or once if that is all it can.

    Raises:
        DataError: Each time something is wrong with the source: it raised, or it ended.
    """
    count = 0
    while True:
        before = count
        try:
            iterator = _iterator(batches)
            for batch in iterator:
                yield batch
                count += 1
        except DataError:
            raise
        except Exception as error:
            raise _raised(error, count) from error
        if iterator is batches or count == before:
            break
    raise DataError(
        f"the data source ended after {_count(count)}: step {count} (counted from 0) has no batch. "
        f"A one-shot iterator is not repeated: pass something that can be iterated again (a list, "
        f"a DataLoader, a callable that returns one), or set steps={count}"
    )


def _iterator(made: Iterable[Any]) -> Iterator[Any]:
    return iter(made)


def _count(count: int) -> str:
    return f"{count} batch" if count == 1 else f"{count} batches"


def _raised(error: Exception, count: int) -> DataError:
    return DataError(
        f"the data source raised {type(error).__name__} after {_count(count)}, reading the batch "
        f"of step {count}: {error}"
    )


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

    def tensors(self, batch: Any, step: int) -> list[torch.Tensor]:
        """The tensor leaves of the batch of `step`.

        Raises:
            DataError: Structure, a shape, a dtype or a constant differs from the example's; the
                text names the leaf.
        """
        leaves, structure = pytree.tree_flatten(plain(batch))
        if structure != self.spec.structure:
            raise DataError(
                f"the batch of step {step} has another structure than the first batch: expected "
                f"{pytree.treespec_pprint(self.spec.structure)}, found "
                f"{pytree.treespec_pprint(structure)}"
            )
        where = dict(zip(self.spec.tensor_leaves, range(len(self.spec.shapes)), strict=True))
        for i, leaf in enumerate(leaves):
            if i in where:
                self._check_tensor(leaf, i, where[i], step)
            elif not _equal(leaf, self.spec.constants[i]):
                raise DataError(
                    f"{self.names[i]} of step {step} is {leaf!r}, in the first batch it was "
                    f"{self.spec.constants[i]!r}: values that are no tensors are compiled into the "
                    "model; pass a tensor if it changes"
                )
        return [leaves[i] for i in self.spec.tensor_leaves]

    def _check_tensor(self, leaf: Any, at: int, tensor: int, step: int) -> None:
        shape, dtype = self.spec.shapes[tensor], self.spec.dtypes[tensor]
        dim = self.spec.batch_dims[tensor]
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
                    "drop_last=True to the DataLoader"
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
