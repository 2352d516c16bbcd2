"""Weights laid over a model: which tensor of theirs is which of the model, and what fits none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from raypar.errors import CheckpointError, did_you_mean
from raypar.sharding.pieces import Piece
from raypar.stages.materialise import state_names
from raypar.train.checkpoint import Checkpoint
from raypar.train.weights.opening import weights_at
from raypar.train.weights.weights import Form, Weights

_SHOWN = 4


@dataclass(frozen=True)
class FileWeights:
    """What a model begins with (`raypar.stages.initial.InitialWeights`), read from a file.

    Attributes:
        weights: The file.
        names: Canonical name in the model → name in the file.
    """

    weights: Weights
    names: Mapping[str, str]

    def has(self, name: str) -> bool:
        """See `InitialWeights.has`."""
        return name in self.names

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """See `InitialWeights.fill`.

        Raises:
            CheckpointError: It cannot be read, on this rank.
        """
        self.weights.fill(self.names[name], piece, out)


def initial_weights(
    where: Checkpoint | str | Path, model: nn.Module
) -> tuple[FileWeights, tuple[str, ...]]:
    """Lays the weights at a path over a model, as ``load_state_dict`` would: by their names.

    A tied tensor needs one of its names to be there; of several the last one counts. Buffers that
    the model does not save are as the model makes them, even where the file has values for them.

    Args:
        where: As for `weights_at`.
        model: The model, on any device (meta too).

    Returns:
        The weights, and notes for the user.

    Raises:
        CheckpointError: There are none, or they are of another model: tensors are missing there,
            missing here, or have another shape or kind of number.
    """
    weights = weights_at(where)
    names = state_names(model)
    forms = {
        name: Form(tuple(t.shape), t.dtype)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    found = {of: name for name, of in names.items() if name in weights.names}
    passing = {n for n, _ in model.named_buffers(remove_duplicate=False)} - set(names)
    unread = [n for n in weights.names if n not in names]
    _check(weights, forms, names, found, [n for n in unread if n not in passing])
    return FileWeights(weights, found), _notes(weights, forms, found, passing & set(unread))


def _check(
    weights: Weights,
    forms: Mapping[str, Form],
    names: Mapping[str, str],
    found: Mapping[str, str],
    unexpected: list[str],
) -> None:
    missing = [of for of in dict.fromkeys(names.values()) if of not in found]
    wrong = [
        f"{name!r} is {weights.forms[weights.names[there]]} there and {forms[name]} here"
        for name, there in found.items()
        if not _fits(weights.forms[weights.names[there]], forms[name])
    ]
    told = []
    if missing:
        whole, near = len(set(names.values())), partial(_near, choices=weights.names, where="there")
        told.append(f"{len(missing)} of its {whole} tensors are not there: {_some(missing, near)}")
    if unexpected:
        near = partial(_near, choices=names, where="here")
        told.append(
            f"{len(unexpected)} of the {len(weights.names)} tensors there are not in it: "
            + _some(unexpected, near)
        )
    if wrong:
        told.append(f"{len(wrong)} have another form: {_some(wrong)}")
    if told:
        raise CheckpointError(
            f"init_from: the weights in {weights.where!r} do not fit the model: {'; '.join(told)}. "
            + _advice(missing, unexpected)
        )


def _advice(missing: list[str], unexpected: list[str]) -> str:
    part = _prefix(unexpected, missing)
    if part is not None:
        return (
            f"The names there are those here without {part!r}: they are of a part of this model; "
            "save the whole model's state_dict() under its own names, and give that"
        )
    whole = _prefix(missing, unexpected)
    if whole is not None:
        return (
            f"The names there are those here behind {whole!r}: this model is a part of that one; "
            "save the part's state_dict(), and give that"
        )
    return (
        "Give the weights of this very model, or have model.target and model.kwargs (model_fn) "
        "make the model that they are of; without init_from the seed initialises it"
    )


def _prefix(short: list[str], long: Collection[str]) -> str | None:
    """What stands before every one of the short names in the long ones."""
    known = set(long)
    heads = [name.removesuffix(short[0]) for name in known if short and name.endswith(short[0])]
    return next(
        (h for h in sorted(heads) if h.endswith(".") and all(h + s in known for s in short)), None
    )


def _fits(there: Form, here: Form) -> bool:
    """Whether values can be taken over: of one kind of number; only floats change their width."""
    both = (there.dtype, here.dtype)
    return there.shape == here.shape and (
        all(d.is_floating_point for d in both)
        or all(d.is_complex for d in both)
        or there.dtype == here.dtype
    )


def _notes(
    weights: Weights,
    forms: Mapping[str, Form],
    found: Mapping[str, str],
    left_out: Collection[str],
) -> tuple[str, ...]:
    changed = Counter(
        (weights.forms[weights.names[there]].dtype, forms[name].dtype)
        for name, there in found.items()
    )
    notes = [
        f"init_from: {count} of {len(found)} tensors are {_told(there)} in {weights.where} and "
        f"were converted to {_told(here)}"
        for (there, here), count in changed.items()
        if there != here
    ]
    if left_out:
        notes.append(
            f"init_from: {len(left_out)} tensors in {weights.where} are buffers that the model "
            f"does not save, and makes itself: {_some(sorted(left_out))}"
        )
    return tuple(notes)


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _near(name: str, choices: Collection[str], where: str) -> str:
    near = did_you_mean(name, choices).removeprefix(" Did you mean ").removesuffix("?")
    return f"{name!r} (nearest {where}: {near})" if near else repr(name)


def _some(items: Sequence[str], told: Callable[[str], str] = str) -> str:
    """The first few, and how many more there are."""
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(told(item) for item in items[:_SHOWN]) + more
