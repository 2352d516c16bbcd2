"""The index of a checkpoint: which tensors there are, and where each part of them is.

A checkpoint is a folder: ``rank-00000.safetensors`` and so on, one file a rank, and ``index.json``,
which is written last. There is no code in either, and nothing that is read here can run any.

Files are checked in blocks of `BLOCK` bytes by their CRC-32, so that a rank that reads a slice
checks all it reads and reads little more. The index has a checksum of its own (`sealed`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from raypar.errors import OptimizerError
from raypar.sharding.pieces import Box
from raypar.stages.plain import from_plain
from raypar.stages.saved import Key, SavedForm
from raypar.train.checkpoint.sealed import Reading, plain, seal

BLOCK = 1 << 20
INDEX = "index.json"

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
        "float8_e5m2",
    )
}  # fmt: skip
"""What can be saved, by name."""

_FILE = re.compile(r"^rank-\d{5,}\.safetensors$")
_MOST_DIMS = 64


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint.

    Attributes:
        name: Its name in the checkpoint's folder.
        size: Its bytes.
        blocks: CRC-32 of every block of `BLOCK` bytes.
    """

    name: str
    size: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class SavedPiece:
    """A part of a tensor in a file, contiguous and row-major.

    Attributes:
        file: Its number among the index's files.
        at: Position of its first byte.
        shape: Shape of the part.
        boxes: As `raypar.sharding.pieces.Piece.boxes`: where in the whole, where in the part.
    """

    file: int
    at: int
    shape: tuple[int, ...]
    boxes: tuple[tuple[Box, Box], ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    like: bool
    pieces: tuple[SavedPiece, ...]

    @property
    def form(self) -> SavedForm:
        """Without where it is."""
        return SavedForm(self.shape, self.dtype, self.like)

    @property
    def bytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        world: Ranks of the run that saved it.
        files: Its files.
        tensors: Its tensors, by key.
        names: Key of the model's ``state_dict()`` → canonical name.
        values: What is saved beside tensors (`raypar.stages.snapshot.RankState.values`).
        state: The training state, as JSON.
        plan: The plan, as JSON; empty where `values` has no ``update``: there are weights alone.
        facts: Whatever else the run told of itself: its config, say.
        versions: Of raypar and torch.
        created: Seconds since the epoch.
    """

    step: int
    world: int
    files: tuple[SavedFile, ...]
    tensors: dict[Key, SavedTensor]
    names: dict[str, str]
    values: dict[str, Any]
    state: dict[str, Any]
    plan: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    @property
    def weights_only(self) -> bool:
        """Whether there is just a model, which no run of raypar trained.

        Its tensors are all of kind ``parameter``: a file of weights does not tell buffers.
        """
        return not self.plan and not self.values["update"]

    def slots(self, kind: str, name: str) -> dict[str, SavedForm]:
        """See `raypar.stages.snapshot.Saved`."""
        return self._by_name.get((kind, name), {})

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], dict[str, SavedForm]]:
        found: dict[tuple[str, str], dict[str, SavedForm]] = {}
        for key, tensor in self.tensors.items():
            found.setdefault((key.kind, key.name), {})[key.slot] = tensor.form
        return found

    def to_bytes(self) -> bytes:
        """The index as a file."""
        found = {
            "block": BLOCK,
            "step": self.step,
            "world": self.world,
            "files": [[f.name, f.size, list(f.blocks)] for f in self.files],
            "tensors": [tensor_to_json(t) for t in self.tensors.values()],
            "names": self.names,
            "values": plain(self.values, "training state"),
            "state": plain(self.state, "training state"),
            "plan": plain(self.plan, "plan"),
            "facts": plain(self.facts, "facts"),
            "versions": self.versions,
            "created": self.created,
        }
        return seal(found)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Index:
        """Reads what `to_bytes` wrote.

        Args:
            data: The file.
            where: Its path, for errors.

        Raises:
            CheckpointError: It is damaged, or of a newer format.
        """
        read = Reading(where)
        raw = read.opened(data)
        try:
            return cls._read(raw, read)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise read.damaged(f"{type(error).__name__}: {error}") from None
        except OptimizerError as error:
            raise read.damaged(str(error)) from None

    @classmethod
    def _read(cls, raw: dict[str, Any], read: Reading) -> Index:
        if raw["block"] != BLOCK:
            raise read.damaged(f"blocks of {raw['block']!r} bytes, expected {BLOCK}")
        files = tuple(_file(f, read) for f in read.list(raw["files"]))
        tensors: dict[Key, SavedTensor] = {}
        for found in read.list(raw["tensors"]):
            tensor = tensor_from_json(found, files, read)
            if tensor.key in tensors:
                raise read.damaged(f"tensor {str(tensor.key)!r} is there twice")
            tensors[tensor.key] = tensor
        names = read.dict(raw["names"])
        return cls(
            step=read.count(raw["step"]),
            world=read.count(raw["world"]),
            files=files,
            tensors=tensors,
            names={read.text(k): read.text(v) for k, v in names.items()},
            values=_values(from_plain(raw["values"]), read),
            state=read.dict(from_plain(raw["state"])),
            plan=read.dict(from_plain(raw["plan"])),
            facts=read.dict(from_plain(raw["facts"])),
            versions={k: read.text(v) for k, v in read.dict(raw["versions"]).items()},
            created=float(raw["created"]),
        )


def tensor_to_json(tensor: SavedTensor) -> list[Any]:
    """``[kind, slot, name, shape, dtype, like, [[file, at, shape, boxes], …]]``."""
    pieces = [[p.file, p.at, p.shape, p.boxes] for p in tensor.pieces]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [*tensor.key, tensor.shape, dtype, tensor.like, pieces]


def tensor_from_json(
    raw: Any, files: Sequence[SavedFile], read: Reading, *, whole: bool = True
) -> SavedTensor:
    """Reads what `tensor_to_json` gave.

    Args:
        raw: The JSON value.
        files: What pieces refer to.
        read: What reads.
        whole: Whether the pieces have to make the whole tensor.

    Raises:
        CheckpointError: A part lies outside of its file or of the whole, or parts are missing.
    """
    kind, slot, name, shape, dtype, like, parts = read.list(raw)
    key = Key(read.text(kind), read.text(slot), read.text(name))
    sizes = read.counts(shape)
    if dtype not in DTYPES or not isinstance(like, bool) or len(sizes) > _MOST_DIMS:
        raise read.damaged(f"tensor {str(key)!r} is {sizes} {dtype!r:.30}")
    pieces = tuple(
        _piece(p, sizes, DTYPES[dtype].itemsize, files, key, read) for p in read.list(parts)
    )
    covered = sum(math.prod(p.shape) for p in pieces)
    if whole and covered != math.prod(sizes):
        raise read.damaged(f"tensor {str(key)!r}: {covered} of {math.prod(sizes)} elements")
    return SavedTensor(key, sizes, DTYPES[dtype], like, pieces)


def _piece(
    raw: Any, whole: tuple[int, ...], itemsize: int, files: Sequence[SavedFile], key: Key,
    read: Reading,
) -> SavedPiece:  # fmt: skip
    file, at, shape, boxes = read.list(raw)
    sizes = read.counts(shape)
    number, first = read.count(file), read.count(at)
    end = first + math.prod(sizes) * itemsize
    if number >= len(files) or end > files[number].size or len(sizes) != len(whole):
        raise read.damaged(f"tensor {str(key)!r}: bytes {first} to {end} of file {number}")
    pairs = []
    for pair in read.list(boxes):
        there, here = read.list(pair)
        pairs.append((_box(there, whole, key, read), _box(here, sizes, key, read)))
        if [n for _, n in pairs[-1][0]] != [n for _, n in pairs[-1][1]]:
            raise read.damaged(f"tensor {str(key)!r}: {there!r:.80} does not fit {here!r:.80}")
    inside = sum(math.prod(n for _, n in here) for _, here in pairs)
    if inside != math.prod(sizes):
        raise read.damaged(f"tensor {str(key)!r}: a part of {sizes} with {inside} elements")
    return SavedPiece(number, first, sizes, tuple(pairs))


def _box(raw: Any, shape: tuple[int, ...], key: Key, read: Reading) -> Box:
    box = tuple(read.counts(pair) for pair in read.list(raw))
    if len(box) != len(shape) or any(
        len(pair) != 2 or sum(pair) > n for pair, n in zip(box, shape, strict=True)
    ):
        raise read.damaged(f"tensor {str(key)!r}: {raw!r:.80} is outside of {shape}")
    return tuple((start, length) for start, length in box)


def _file(raw: Any, read: Reading) -> SavedFile:
    name, size, blocks = read.list(raw)
    found = SavedFile(read.text(name), read.count(size), read.counts(blocks))
    if not _FILE.match(found.name):
        raise read.damaged(f"file name {found.name!r:.80}")
    if len(found.blocks) != -(-found.size // BLOCK):
        raise read.damaged(f"{len(found.blocks)} checksums for {found.size} bytes")
    return found


def _values(found: Any, read: Reading) -> dict[str, Any]:
    values = read.dict(found)
    for state in read.dict(values["states"]).values():
        read.dict(state)
    read.dict(values["update"])
    return values
