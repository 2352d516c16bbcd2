"""How a rank takes its part of a checkpoint: only the slices it needs, every byte of them checked.

Whatever plan saved it, and whatever plan takes it, a wanted part is cut into the boxes that it has
in common with the saved pieces; each box is read in spans of at most a few MiB.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from raypar.errors import CheckpointError
from raypar.sharding.pieces import Box, Piece
from raypar.stages.saved import Key, Want
from raypar.stages.snapshot import RankState
from raypar.train.checkpoint.format import BLOCK, INDEX, Index, SavedFile
from raypar.train.checkpoint.image import memory_of
from raypar.train.checkpoint.storage import Storage, storage_at

_SPAN = 4 * BLOCK
_OPEN = 4  # files of which the last blocks are kept


class Spans(Protocol):
    """A file that is read by spans."""

    def read(self, at: int, count: int) -> torch.Tensor:
        """`count` bytes from position `at` on; they stay until the next call."""


class CheckedFile:
    """Reads a file of a checkpoint by whole blocks, and checks each of them.

    The blocks of the last span stay, since the next span often begins in the last of them.
    """

    def __init__(self, storage: Storage, folder: str, file: SavedFile) -> None:
        self._storage = storage
        self._name = f"{folder}/{file.name}" if folder else file.name
        self._file = file
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._first = self._end = 0  # the blocks that are there

    def read(self, at: int, count: int) -> torch.Tensor:
        """`count` bytes from position `at` on; they stay until the next call.

        Raises:
            CheckpointError: The file is missing, short, or a block has another checksum.
        """
        first, end = at // BLOCK, -(-(at + count) // BLOCK)
        if first < self._first or end > self._end:
            self._load(first, end)
        start = at - self._first * BLOCK
        return self._memory[start : start + count]

    def _load(self, first: int, end: int) -> None:
        kept = 0
        room = (end - first) * BLOCK
        memory = self._memory
        if memory.numel() < room:
            memory = torch.empty(room, dtype=torch.uint8)
        if self._first <= first < self._end:
            start = (first - self._first) * BLOCK
            kept = self._end - first
            memory[: kept * BLOCK] = self._memory[start : start + kept * BLOCK].clone()
        self._memory, self._first, self._end = memory, first, first + kept
        begin = (first + kept) * BLOCK
        size = min(end * BLOCK, self._file.size) - begin
        data = memory_of(memory)[kept * BLOCK : kept * BLOCK + size]
        self._fill(data, begin)
        for number in range(first + kept, end):
            at = number * BLOCK - begin
            self._check(number, data[at : at + BLOCK])
        self._end = end

    def _fill(self, data: memoryview, begin: int) -> None:
        path = self._storage.path(self._name)
        try:
            count = self._storage.read_into(self._name, begin, data)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; expected {self._file.size} bytes") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if count < len(data):
            raise CheckpointError(
                f"{path} is cut off: it ends after {begin + count} bytes, expected "
                f"{self._file.size}"
            )

    def _check(self, number: int, block: memoryview) -> None:
        found, wanted = zlib.crc32(block), self._file.blocks[number]
        if found != wanted:
            raise CheckpointError(
                f"{self._storage.path(self._name)} is damaged: bytes {number * BLOCK} to "
                f"{number * BLOCK + len(block)} have the checksum {found:08x}, expected "
                f"{wanted:08x}"
            )

    def check_all(self) -> None:
        """Reads and checks the whole file.

        Raises:
            CheckpointError: As `read`; also where the file is longer than it should be.
        """
        for at in range(0, self._file.size, _SPAN):
            self.read(at, min(_SPAN, self._file.size - at))
        try:
            size = self._storage.size(self._name)
        except FileNotFoundError:
            size = -1
        if size != self._file.size:
            raise CheckpointError(
                f"{self._storage.path(self._name)} has {size} bytes, expected {self._file.size}"
            )


class Reader:
    """Reads tensors of a checkpoint, or any parts of them.

    Args:
        storage: Where it lies.
        folder: Its folder there.
        index: What it holds.
    """

    def __init__(self, storage: Storage, folder: str, index: Index) -> None:
        self._storage = storage
        self._folder = folder
        self._index = index
        self._files: OrderedDict[int, CheckedFile] = OrderedDict()

    def fill(self, key: Key, piece: Piece, out: torch.Tensor, *, converts: bool = False) -> None:
        """Reads a part of a tensor.

        Args:
            key: Which tensor.
            piece: Which part of it.
            out: Memory in the form of the part, on any device.
            converts: Whether `out` may have another dtype than the tensor.

        Raises:
            CheckpointError: The checkpoint does not have that tensor, or is damaged.
        """
        saved = self._index.tensors.get(key)
        if saved is None or (saved.dtype != out.dtype and not converts):
            found = "is not there" if saved is None else f"is {saved.dtype}, wanted {out.dtype}"
            raise CheckpointError(
                f"{self._storage.path(self._folder)}: tensor {str(key)!r} {found}"
            )
        count = 0
        for there, here in piece.boxes:
            for source in saved.pieces:
                for saved_there, saved_here in source.boxes:
                    common = _common(there, saved_there)
                    if common is None:
                        continue
                    into = _narrow(out, _moved(common, there, here))
                    box = _moved(common, saved_there, saved_here)
                    read_box(
                        self._open(source.file), into, source.at, source.shape, saved.dtype, box
                    )
                    count += math.prod(n for _, n in common)
        if count != piece.numel:
            raise CheckpointError(
                f"{self._storage.path(self._folder)} is damaged: it has {count} of "
                f"{piece.numel} elements of a part of {str(key)!r}"
            )

    def order(self, want: Want) -> tuple[int, int]:
        """Where a tensor begins: reading in this order goes through files from front to end."""
        saved = self._index.tensors.get(want.key)
        return (saved.pieces[0].file, saved.pieces[0].at) if saved and saved.pieces else (0, 0)

    def _open(self, number: int) -> CheckedFile:
        file = self._files.pop(number, None)
        if file is None:
            file = CheckedFile(self._storage, self._folder, self._index.files[number])
        self._files[number] = file
        while len(self._files) > _OPEN:
            self._files.popitem(last=False)
        return file


def read_box(
    file: Spans,
    out: torch.Tensor,
    at: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    box: Box,
) -> None:
    """Reads a box of a row-major tensor, in spans of at most a few MiB.

    Args:
        file: Where it is.
        out: Memory in the form of the box, of any dtype.
        at: Position of the tensor's first byte.
        shape: The tensor's shape.
        dtype: The tensor's dtype.
        box: Which part of it.
    """
    strides = [1] * len(shape)
    for dim in reversed(range(len(strides) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    _read_spans(file, out, at + first * dtype.itemsize, strides, dtype)


def _read_spans(
    file: Spans, out: torch.Tensor, at: int, strides: Sequence[int], dtype: torch.dtype
) -> None:
    """Fills `out` from elements that lie `strides` apart, the first of them at byte `at`."""
    if not out.numel():
        return
    itemsize = dtype.itemsize
    last = sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True))
    span = (last + 1) * itemsize
    if span <= _SPAN or out.numel() == 1:
        data = file.read(at, span).view(dtype)
        out.copy_(data.as_strided(out.shape, strides))
        return
    dim = next(d for d, n in enumerate(out.shape) if n > 1)
    rows = max(1, _SPAN // (strides[dim] * itemsize))
    for row in range(0, out.shape[dim], rows):
        part = out.narrow(dim, row, min(rows, out.shape[dim] - row))
        _read_spans(file, part, at + row * strides[dim] * itemsize, strides, dtype)


def _common(a: Box, b: Box) -> Box | None:
    found = []
    for (start, n), (other, m) in zip(a, b, strict=True):
        low, high = max(start, other), min(start + n, other + m)
        if low >= high:
            return None
        found.append((low, high - low))
    return tuple(found)


def _moved(box: Box, there: Box, here: Box) -> Box:
    """A box inside of `there`, as seen where `there` lies at `here`."""
    return tuple(
        (start - low + at, n)
        for (start, n), (low, _), (at, _) in zip(box, there, here, strict=True)
    )


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, n) in enumerate(box):
        tensor = tensor.narrow(dim, start, n)
    return tensor


def read_index(storage: Storage, folder: str) -> Index:
    """The index of a checkpoint.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer format.
    """
    name = f"{folder}/{INDEX}" if folder else INDEX
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise CheckpointError(
            f"{storage.path(folder)!r} is no checkpoint: it has no {INDEX}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {storage.path(name)!r}: {error}") from None
    return Index.from_bytes(data, storage.path(name))


@dataclass(frozen=True)
class FormsJob:
    """Asks a rank for the forms of its tensors."""

    def __call__(self, state: RankState) -> dict[Key, tuple[tuple[int, ...], torch.dtype]]:
        """See `RankState.forms`."""
        return state.forms()


@dataclass(frozen=True)
class RenewJob:
    """After a restore: has a rank's optimizer take the options of this run."""

    def __call__(self, state: RankState) -> None:
        """See `RankState.renew_options`."""
        state.renew_options()


@dataclass(frozen=True)
class RestoreJob:
    """Has a rank take its part of a checkpoint.

    Attributes:
        root: The storage.
        folder: The checkpoint's folder, inside of it.
        weights_only: Parameters and buffers alone.
    """

    root: str
    folder: str
    weights_only: bool = False

    def __call__(self, state: RankState) -> int:
        """Reads, and returns the bytes that it took.

        Raises:
            CheckpointError: The checkpoint is damaged. The rank's state is then of no use.
            OptimizerError: It was saved with another recipe.
        """
        storage = storage_at(self.root)
        index = read_index(storage, self.folder)
        reader = Reader(storage, self.folder, index)
        wants = state.wants(index, weights_only=self.weights_only)
        for want in sorted(wants, key=reader.order):
            reader.fill(want.key, want.piece, want.tensor)
        state.restored(index, weights_only=self.weights_only)
        return sum(w.tensor.numel() * w.tensor.dtype.itemsize for w in wants)
