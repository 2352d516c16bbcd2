"""A checkpoint that ranks are writing, and the step that makes it count."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from raypar.errors import CheckpointError
from raypar.stages.run import Run
from raypar.train.checkpoint.checkpoint import Checkpoint
from raypar.train.checkpoint.committing import index_of, read_note
from raypar.train.checkpoint.format import INDEX
from raypar.train.checkpoint.storage import Storage
from raypar.train.checkpoint.writing import MARK, note_name


@dataclass(frozen=True)
class Pending:
    """A checkpoint under way.

    Attributes:
        run: Whose ranks write it.
        name: What its folder will be called.
        folder: What it is called until then.
        token: What its mark holds.
        world: Ranks of the run.
        step: Optimizer steps done.
        state: Training state, as JSON.
        plan: The plan, as JSON.
        facts: What else is kept.
    """

    run: Run
    name: str
    folder: str
    token: str
    world: int
    step: int
    state: dict[str, Any]
    plan: dict[str, Any]
    facts: dict[str, Any]

    def finish(self, storage: Storage) -> Checkpoint | None:
        """Makes it count once all notes are there; may be tried again after an `OSError`.

        Returns:
            None while notes are missing.

        Raises:
            CheckpointError: A rank has failed, or the folder was removed.
        """
        folder = self.folder
        notes = [note_name(rank) for rank in range(self.world)]
        there = set(storage.names(folder))
        if MARK not in there:
            return self._counted(storage)
        if not set(notes) <= there:
            return None
        read = [
            read_note(storage.read(f"{folder}/{name}"), storage.path(f"{folder}/{name}"))
            for name in notes
        ]
        index = index_of(read, step=self.step, state=self.state, plan=self.plan, facts=self.facts)
        storage.write(f"{folder}/{INDEX}", [index.to_bytes()])
        storage.settle(folder, self.name)
        for name in (*notes, MARK):  # they do no harm, so that nothing before may depend on it
            with contextlib.suppress(Exception):
                storage.remove(f"{self.name}/{name}")
        return Checkpoint.of(storage, self.name, index)

    def _counted(self, storage: Storage) -> Checkpoint:
        """The checkpoint whose folder is not there any more, if it got its name already."""
        if INDEX in storage.names(self.name):  # an error came after the step that made it count
            return Checkpoint(storage.path(self.name))
        raise CheckpointError(
            f"checkpoint {self.name!r} was removed from {storage.root!r} while it was written; "
            "something deleted it: the disk's owner, or another run that writes to the same folder"
        )
