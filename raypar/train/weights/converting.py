"""Checkpoints made of other weights, and checkpoints copied to another storage.

Either way one tensor, or a few MiB, is in memory at a time, and the new checkpoint is there as a
whole or not at all: where a folder can be renamed that is done last, elsewhere its index is written
last.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from raypar._version import __version__
from raypar.errors import CheckpointError
from raypar.sharding.pieces import whole_piece
from raypar.stages.saved import PARAMETER, Key
from raypar.train.checkpoint import Checkpoint
from raypar.train.checkpoint.format import (
    BLOCK,
    INDEX,
    Index,
    SavedFile,
    SavedPiece,
    SavedTensor,
)
from raypar.train.checkpoint.image import lay_out, memory_of
from raypar.train.checkpoint.reading import CheckedFile
from raypar.train.checkpoint.storage import Storage, storage_at
from raypar.train.checkpoint.writing import file_name
from raypar.train.state import TrainState
from raypar.train.weights.weights import Weights, refuse_existing

_SPAN = 4 * BLOCK


def save_as_checkpoint(weights: Weights, path: str | Path) -> Checkpoint:
    """Writes weights as a checkpoint before the first step: it has no optimizer, and no plan.

    Args:
        weights: Any.
        path: Folder or URL of the checkpoint, which must not be there yet.

    Raises:
        CheckpointError: There is something already, the weights are damaged, or it cannot be
            written.
    """
    keys = {str(Key(PARAMETER, "", name)): Key(PARAMETER, "", name) for name in weights.forms}
    forms = {text: weights.forms[key.name] for text, key in keys.items()}
    header, offsets, size = lay_out(forms)
    tensors = {}
    for text, key in keys.items():
        form = weights.forms[key.name]
        boxes = whole_piece(form.shape).boxes
        piece = SavedPiece(0, len(header) + offsets[text], form.shape, boxes)
        tensors[key] = SavedTensor(key, form.shape, form.dtype, True, (piece,))

    def data() -> Iterator[memoryview]:
        yield memoryview(header)
        for text in sorted(offsets, key=lambda t: offsets[t]):
            tensor = weights.read(keys[text].name)
            if tensor.numel():
                yield memory_of(tensor.reshape(-1).view(torch.uint8))

    with _new(path) as (storage, folder):
        sums: list[int] = []
        storage.write(f"{folder}/{file_name(0)}", _summed(data(), sums))
        index = Index(
            step=0,
            world=1,
            files=(SavedFile(file_name(0), len(header) + size, tuple(sums)),),
            tensors=tensors,
            names=dict(weights.names),
            values={"states": {}, "update": {}},
            state=TrainState().to_json(),
            plan={},
            facts={"converted_from": weights.where},
            versions={"raypar": __version__, "torch": torch.__version__},
            created=time.time(),
        )
        storage.write(f"{folder}/{INDEX}", [index.to_bytes()])
    return Checkpoint(path)


def copy_checkpoint(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """Copies a checkpoint to another place; every byte is checked on its way.

    Args:
        checkpoint: Which.
        path: Folder or URL of the copy, which must not be there yet.

    Raises:
        CheckpointError: There is something already, the checkpoint is damaged, or the copy cannot
            be written.
    """
    with _new(path) as (storage, folder):
        for file in checkpoint.index.files:
            source = CheckedFile(checkpoint.storage, checkpoint.name, file)
            spans = (
                memory_of(source.read(at, min(_SPAN, file.size - at)))
                for at in range(0, file.size, _SPAN)
            )
            storage.write(f"{folder}/{file.name}", spans)
        storage.write(f"{folder}/{INDEX}", [checkpoint.index.to_bytes()])
    return Checkpoint(path)


@contextlib.contextmanager
def _new(path: str | Path) -> Iterator[tuple[Storage, str]]:
    """Storage and folder to write a new checkpoint to."""
    text = str(path).rstrip("/") if "://" in str(path) else str(Path(path).expanduser().absolute())
    parent, _, name = text.rpartition("/")
    storage = storage_at(parent)
    refuse_existing(text, name in storage.names())
    folder = storage.begin(name, secrets.token_hex(4))
    try:
        storage.make_folder(folder)
        yield storage, folder
        storage.settle(folder, name)
    except BaseException as error:
        with contextlib.suppress(Exception):
            storage.remove(folder)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {text!r}: {error}") from None
        raise


def _summed(chunks: Iterator[memoryview], sums: list[int]) -> Iterator[memoryview]:
    """Passes a file's bytes on; the CRC-32 of each of its blocks is added to `sums`."""
    room, crc = BLOCK, 0
    for chunk in chunks:
        for at in _cuts(len(chunk), room):
            part = chunk[at.start : at.stop]
            crc = zlib.crc32(part, crc)
            room -= len(part)
            if not room:
                sums.append(crc)
                room, crc = BLOCK, 0
        yield chunk
    if room < BLOCK:
        sums.append(crc)


def _cuts(length: int, first: int) -> Iterator[range]:
    """Cuts bytes where blocks end, the first of them after `first` bytes."""
    at = 0
    for number in range(1 + math.ceil(max(0, length - first) / BLOCK)):
        end = min(length, at + (BLOCK if number else first))
        yield range(at, end)
        at = end
