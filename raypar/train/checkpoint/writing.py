"""How a rank saves its part: copied to host memory at once, written by a thread while steps go on.

The jobs here travel to the ranks (`RankRunner.visit`). A rank that has written its file leaves a
note beside it, which says what is in it; whoever asked for the checkpoint waits for all notes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raypar.errors import CheckpointError
from raypar.stages.snapshot import RankState
from raypar.train.checkpoint.format import SavedPiece, SavedTensor, tensor_to_json
from raypar.train.checkpoint.image import Image
from raypar.train.checkpoint.sealed import plain, seal
from raypar.train.checkpoint.storage import Storage, storage_at

MARK = "writing"
"""A file that stands in a folder while a checkpoint is written into it."""


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def note_name(rank: int) -> str:
    """Name of what a rank tells of its file."""
    return f"rank-{rank:05d}.note"


@dataclass(frozen=True)
class Copied:
    """What a rank answers once its part is copied.

    Attributes:
        bytes: How much it is.
        seconds: How long the copy took, of which `waited` for memory that an earlier checkpoint
            was still written from.
        waited: See there.
    """

    bytes: int
    seconds: float
    waited: float


@dataclass(frozen=True)
class SaveJob:
    """Has a rank save its part.

    Attributes:
        root: The storage.
        folder: Folder to write to, inside of it.
        token: What the folder's mark holds: a rank that does not find it is somewhere else.
    """

    root: str
    folder: str
    token: str

    def __call__(self, state: RankState) -> Copied:
        """Copies, and leaves the writing to a thread.

        Raises:
            CheckpointError: This rank does not reach the storage, or holds what cannot be saved.
        """
        began = time.perf_counter()
        writer = _writer_of(state)
        storage = storage_at(self.root)
        if self.root not in writer.seen:
            self._check_mark(storage, state.spec.rank)
            writer.seen.add(self.root)
        image = Image.of(state.held())
        values = plain(state.values(), "the training state")
        before = time.perf_counter()
        buffer = writer.buffers.take()
        waited = time.perf_counter() - before
        image.copy(buffer.room(image.size))
        writer.write(_Writing(self, storage, state, image, buffer, values))
        return Copied(image.size, time.perf_counter() - began, waited)

    def _check_mark(self, storage: Storage, rank: int) -> None:
        name = f"{self.folder}/{MARK}"
        try:
            found = storage.read(name).decode(errors="replace")
        except OSError as error:
            found = f"{type(error).__name__}: {error}"
        if found != self.token:
            raise CheckpointError(
                f"rank {rank} does not find {storage.path(name)!r}, which the process that leads "
                f"the run has just written ({found:.200}): all nodes must reach one storage; set "
                "storage_path to a folder that they share, or CheckpointConfig.storage "
                "(checkpoint.storage) to one, or to a URL such as s3://bucket/run"
            )


@dataclass(frozen=True)
class ReadyJob:
    """Has a rank get memory for what it holds now, in a thread: new memory is slow at first."""

    def __call__(self, state: RankState) -> None:
        """Returns at once."""
        writer = _writer_of(state)
        size = Image.of(state.held()).size
        threading.Thread(
            target=writer.buffers.touch, args=(size,), name="raypar-checkpoint-memory", daemon=True
        ).start()


@dataclass(frozen=True)
class FailureJob:
    """Asks a rank whether it failed to write: its note may not have been written either.

    Attributes:
        token: What `SaveJob` had.
    """

    token: str

    def __call__(self, state: RankState) -> str | None:
        """Why it failed, or None."""
        return _writer_of(state).failures.get(self.token)


class _Buffer:
    """Host memory that is used again and again."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory: torch.Tensor | None = None

    def room(self, size: int) -> torch.Tensor:
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # the old one goes before the new one comes
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory


class _Buffers:
    """Two buffers: one may still be written from while the next checkpoint is copied.

    The second one is made only when a checkpoint comes before the last is written.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._turn = threading.Condition()
        self._free: list[_Buffer] = []
        self._made = 0

    def take(self) -> _Buffer:
        """A free buffer; waits for one where both are in use."""
        with self._turn:
            if not self._free and self._made < 2:
                self._made += 1
                self._free.append(_Buffer(self._pinned))
            self._turn.wait_for(lambda: self._free)
            return self._free.pop()

    def touch(self, size: int) -> None:
        """Gets a buffer ready to be copied into."""
        buffer = self.take()
        try:
            buffer.room(size).zero_()
        finally:
            self.give_back(buffer)

    def give_back(self, buffer: _Buffer) -> None:
        with self._turn:
            self._free.append(buffer)
            self._turn.notify()


@dataclass(frozen=True)
class _Writing:
    """A copied part on its way to storage."""

    job: SaveJob
    storage: Storage
    state: RankState
    image: Image
    buffer: _Buffer
    values: Mapping[str, Any]

    def run(self) -> None:
        """Writes file and note."""
        rank = self.state.spec.rank
        sums: list[int] = []
        room = self.buffer.room(self.image.size)
        self.storage.write(f"{self.job.folder}/{file_name(rank)}", self.image.blocks(room, sums))
        self.storage.write(f"{self.job.folder}/{note_name(rank)}", [self._note(sums)])

    def tell(self, failure: str) -> None:
        """Leaves a note that it failed, where that is possible."""
        note = seal({"failure": failure})
        self.storage.write(f"{self.job.folder}/{note_name(self.state.spec.rank)}", [note])

    def _note(self, sums: list[int]) -> bytes:
        spec, head = self.state.spec, len(self.image.header)
        tensors = []
        for place in self.image.places:
            held = place.held
            shape = tuple(held.tensor.shape)
            piece = SavedPiece(0, head + place.offset, shape, held.piece.boxes)
            dtype = held.tensor.dtype
            saved = SavedTensor(held.key, held.shape, dtype, held.like, (piece,))
            tensors.append(tensor_to_json(saved))
        return seal(
            {
                "rank": spec.rank,
                "group": spec.group,
                "file": file_name(spec.rank),
                "size": head + self.image.size,
                "blocks": sums,
                "tensors": tensors,
                "values": self.values,
                "names": self.state.names if spec.rank == 0 else {},
            }
        )


class _Writer:
    """Writes one rank's parts, one after the other, in a thread that ends when there are none."""

    def __init__(self, pinned: bool) -> None:
        self.buffers = _Buffers(pinned)
        self.seen: set[str] = set()
        self.failures: dict[str, str] = {}
        self._turn = threading.Lock()
        self._waiting: list[_Writing] = []
        self._running = False

    def write(self, writing: _Writing) -> None:
        """Hands a copied part over."""
        with self._turn:
            self._waiting.append(writing)
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._serve, name="raypar-checkpoint", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._turn:
                if not self._waiting:
                    self._running = False
                    return
                writing = self._waiting.pop(0)
            try:
                writing.run()
            except BaseException as error:
                self._failed(writing, error)
            finally:
                self.buffers.give_back(writing.buffer)

    def _failed(self, writing: _Writing, error: BaseException) -> None:
        where = writing.storage.path(writing.job.folder)
        text = (
            f"rank {writing.state.spec.rank} could not write its part of {where!r}: "
            f"{type(error).__name__}: {error}"
        )
        self.failures[writing.job.token] = text
        with contextlib.suppress(Exception):  # without storage, `FailureJob` is what asks for it
            writing.tell(text)


def _writer_of(state: RankState) -> _Writer:
    known = state.scratch.get("checkpoint writer")
    if not isinstance(known, _Writer):
        known = state.scratch["checkpoint writer"] = _Writer(pinned=state.on_device)
    return known
