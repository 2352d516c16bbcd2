"""From the notes of all ranks to the index of a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from raypar._version import __version__
from raypar.errors import CheckpointError, OptimizerError
from raypar.stages.plain import from_plain
from raypar.stages.saved import Key
from raypar.train.checkpoint.format import Index, SavedFile, SavedTensor, tensor_from_json
from raypar.train.checkpoint.sealed import Reading


@dataclass(frozen=True)
class Note:
    """What a rank tells of its file; the pieces of its tensors refer to that file as number 0."""

    rank: int
    group: int
    file: SavedFile
    tensors: tuple[SavedTensor, ...]
    values: Mapping[str, Any]
    names: Mapping[str, str]


def read_note(data: bytes, where: str) -> Note:
    """Reads what a rank left (`raypar.train.checkpoint.writing`).

    Raises:
        CheckpointError: The rank tells that it failed, or the note is damaged.
    """
    read = Reading(where)
    raw = read.opened(data)
    if "failure" in raw:
        raise CheckpointError(read.text(raw["failure"]))
    try:
        file = SavedFile(
            read.text(raw["file"]), read.count(raw["size"]), read.counts(raw["blocks"])
        )
        found = read.list(raw["tensors"])
        tensors = tuple(tensor_from_json(t, [file], read, whole=False) for t in found)
        values = read.dict(from_plain(raw["values"]))
        rank, group = read.count(raw["rank"]), read.count(raw["group"])
        return Note(rank, group, file, tensors, values, read.dict(raw["names"]))
    except (KeyError, TypeError, ValueError, OptimizerError) as error:
        raise read.damaged(f"{type(error).__name__}: {error}") from None


def index_of(
    notes: Sequence[Note],
    *,
    step: int,
    state: dict[str, Any],
    plan: dict[str, Any],
    facts: dict[str, Any],
) -> Index:
    """The index of a checkpoint.

    Args:
        notes: Of all ranks, by rank.
        step: Optimizer steps done.
        state: Training state, as JSON.
        plan: The plan, as JSON.
        facts: What else the run tells of itself.

    Raises:
        CheckpointError: The ranks together have not written every element of a tensor once.
    """
    tensors = _merged_tensors(notes)
    for key, tensor in tensors.items():
        count, wanted = sum(math.prod(p.shape) for p in tensor.pieces), math.prod(tensor.shape)
        if count != wanted:
            raise CheckpointError(
                f"the ranks wrote {count} of the {wanted} elements of {str(key)!r}"
            )
    return Index(
        step=step,
        world=len(notes),
        files=tuple(note.file for note in notes),
        tensors=tensors,
        names=dict(notes[0].names),
        values=_merged_values(notes),
        state=state,
        plan=plan,
        facts=facts,
        versions={"raypar": __version__, "torch": torch.__version__},
        created=time.time(),
    )


def _merged_tensors(notes: Sequence[Note]) -> dict[Key, SavedTensor]:
    """Every tensor with the pieces of one rank group.

    A frozen parameter that several rank groups hold has been written by each of them.
    """
    found: dict[Key, SavedTensor] = {}
    group_of: dict[Key, int] = {}
    for number, note in enumerate(notes):
        for tensor in note.tensors:
            known = found.get(tensor.key)
            if known is not None and group_of[tensor.key] != note.group:
                continue
            pieces = tuple(replace(p, file=number) for p in tensor.pieces)
            if known is not None:
                pieces = known.pieces + pieces
            group_of[tensor.key] = note.group
            found[tensor.key] = replace(tensor, pieces=pieces)
    return dict(sorted(found.items()))


def _merged_values(notes: Sequence[Note]) -> dict[str, Any]:
    """Of what several ranks hold any one: they are equal."""
    states: dict[str, Any] = {}
    for note in notes:
        for name, state in note.values["states"].items():
            states.setdefault(name, state)
    return {"states": states, "update": notes[0].values["update"]}
