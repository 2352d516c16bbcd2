"""Weights in safetensors files: one, or several with an index, as Hugging Face writes them.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes with the length of a JSON header,
the header, then the tensors' bytes; little-endian, row-major. Files are read by spans and never
mapped, so that what is read does not stay in memory, and URLs are read alike.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Piece, whole_piece
from raypar.train.checkpoint.image import DTYPES_BY_NAME, memory_of, write_tensors
from raypar.train.checkpoint.reading import read_box
from raypar.train.checkpoint.storage import Storage, storage_at
from raypar.train.weights.weights import Form, Weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names in a Hugging Face folder: a model in one file, or where each tensor of it is."""

_LONGEST_HEADER = 100_000_000  # as the format's own reader has it
_MOST_DIMS = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: file, position of its first byte, form."""

    file: str
    at: int
    form: Form


class SafetensorsWeights(Weights):
    """Weights in safetensors files.

    Args:
        storage: Where they lie.
        files: Their names there.
        where: What to call them in errors.

    Raises:
        CheckpointError: A file is missing or damaged, or two hold the same name.
    """

    def __init__(self, storage: Storage, files: list[str], where: str) -> None:
        self.where = where
        self._root = storage.root
        self._storage: Storage | None = storage
        self._places: dict[str, _Place] = {}
        self._sizes: dict[str, int] = {}
        ties: dict[str, str] = {}
        for file in files:
            size = _size(storage, file)
            self._sizes[file] = size
            header, data = _header(storage, file, size)
            notes = header.pop("__metadata__", {})
            for name, raw in header.items():
                if name in self._places:
                    raise CheckpointError(
                        f"{storage.path(file)} holds {name!r}, and so does "
                        f"{storage.path(self._places[name].file)}: keep one of them"
                    )
                self._places[name] = _place(raw, file, data, size, f"{storage.path(file)}: {name}")
            ties.update(_ties(notes, header))
        self.forms = {name: place.form for name, place in self._places.items()}
        self.names = {name: name for name in self._places} | ties

    def fill(self, name: str, piece: Piece, out: torch.Tensor) -> None:
        """See `Weights.fill`."""
        if self._storage is None:
            self._storage = storage_at(self._root)
        place = self._places[self.names[name]]
        file = _Spans(self._storage, place.file, self._sizes[place.file])
        for there, here in piece.boxes:
            into = out
            for dim, (start, length) in enumerate(here):
                into = into.narrow(dim, start, length)
            read_box(file, into, place.at, place.form.shape, place.form.dtype, there)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_storage": None}  # a connection does not travel


def save_safetensors(weights: Weights, path: str | Path, names: Iterable[str] = ()) -> None:
    """Writes weights as one file; one tensor at a time is in memory.

    Args:
        weights: Any.
        path: The file; it is there as a whole or not at all.
        names: Which names to write; default: all, tied tensors once for each.

    Raises:
        CheckpointError: The weights are damaged, or the file cannot be written.
    """

    def fill(name: str, room: torch.Tensor) -> None:
        weights.fill(name, whole_piece(tuple(room.shape)), room)

    wanted = list(names) or list(weights.names)
    write_tensors(Path(path), {n: weights.forms[weights.names[n]] for n in wanted}, fill)


def folder_weights(storage: Storage, where: str) -> SafetensorsWeights | None:
    """The weights of a Hugging Face folder; None where it has none in this format.

    Raises:
        CheckpointError: Its index or a file of it is damaged or missing.
    """
    names = storage.names()
    if SINGLE in names:
        return SafetensorsWeights(storage, [SINGLE], where)
    if INDEX not in names:
        return None
    try:
        raw = json.loads(storage.read(INDEX))
        files = sorted(set(raw["weight_map"].values()))
        outside = [f for f in files if posixpath.basename(f) != f or f.startswith(".")]
        if outside:
            raise ValueError(f"file name {outside[0]!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{storage.path(INDEX)} is damaged: {type(error).__name__}: {error}"
        ) from None
    found = SafetensorsWeights(storage, files, where)
    missing = [n for n in raw["weight_map"] if n not in found.names]
    if missing:
        raise CheckpointError(
            f"{storage.path(INDEX)} promises {missing[0]!r} and {len(missing) - 1} more tensors "
            "that none of its files holds"
        )
    return found


class _Spans:
    """Reads one file by spans."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage = storage
        self._name = name
        self._size = size
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, at: int, count: int) -> torch.Tensor:
        """See `raypar.train.checkpoint.reading.Spans`."""
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.uint8)
        found, path = self._memory[:count], self._storage.path(self._name)
        try:
            done = self._storage.read_into(self._name, at, memory_of(found))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing here: every node has to reach it; put it on a folder that they "
                "share, or give a URL such as s3://bucket/model"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if done < count:
            raise CheckpointError(
                f"{path} is cut off: it ends after {at + done} bytes, expected {self._size}"
            )
        return found


def _size(storage: Storage, file: str) -> int:
    try:
        return storage.size(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {storage.path(file)}: {error}") from None


def _header(storage: Storage, file: str, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its data begin."""
    spans, path = _Spans(storage, file, size), storage.path(file)
    if size < 8:
        raise CheckpointError(f"{path} is no safetensors file: it has {size} bytes")
    length = int.from_bytes(bytes(memory_of(spans.read(0, 8))), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(
            f"{path} is no safetensors file: a header of {length} bytes in a file of {size}"
        )
    try:
        found = json.loads(bytes(memory_of(spans.read(8, length))))
        if not isinstance(found, dict):
            raise ValueError(f"its header is no object: {found!r:.80}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    return found, 8 + length


def _place(raw: Any, file: str, data: int, size: int, what: str) -> _Place:
    """One tensor of a header, checked against the file's size."""
    try:
        dtype, shape = DTYPES_BY_NAME[raw["dtype"]], tuple(raw["shape"])
        first, end = raw["data_offsets"]
        numbers = [*shape, first, end]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"numbers {numbers!r:.80}")
        if end - first != math.prod(shape) * dtype.itemsize or data + end > size:
            raise ValueError(f"bytes {first} to {end} of {size - data} for {shape} {dtype}")
        if len(shape) > _MOST_DIMS:
            raise ValueError(f"{len(shape)} dims")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{what} is damaged: {type(error).__name__}: {error}") from None
    return _Place(file, data + first, Form(shape, dtype))


def _ties(notes: Any, header: Mapping[str, Any]) -> dict[str, str]:
    """Names that safetensors left out, as it notes them: left-out name → the name that is there."""
    if not isinstance(notes, dict):
        return {}
    return {
        name: kept
        for name, kept in notes.items()
        if isinstance(kept, str) and kept in header and name not in header
    }
