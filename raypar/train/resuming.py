"""Where a run's checkpoints lie, and which one it goes on from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from raypar.errors import CheckpointError, ConfigError
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.settings import Settings

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints in the run's own."""


def checkpoint_at(where: Checkpoint | str | Path | None, own: Path) -> Checkpoint | None:
    """The checkpoint that a user means.

    Args:
        where: A checkpoint, its path or URL, the folder of a run, or ``"auto"``.
        own: The run's own folder.

    Raises:
        CheckpointError: There is none (unless ``"auto"`` was meant), or it is damaged.
    """
    if where is None or isinstance(where, Checkpoint):
        return where
    if where == "auto":
        folder = own / CHECKPOINTS
        return CheckpointStore(folder).latest() if folder.is_dir() else None
    inside = Path(where) / CHECKPOINTS
    if "://" in str(where) or not inside.is_dir():
        return Checkpoint(where)
    found = CheckpointStore(inside).latest()
    if found is None:
        raise CheckpointError(
            f"resume_from: run {str(where)!r} has no good checkpoint in {str(inside)!r}; start it "
            "anew, with checkpoint_config=CheckpointConfig(every_steps=100)"
        )
    return found


def beginning(
    settings: Settings, own: Path
) -> tuple[Checkpoint | None, Checkpoint | str | Path | None]:
    """What a run resumes, and else what its weights begin from.

    A checkpoint that holds weights alone cannot be resumed: the run begins from it.

    Args:
        settings: What the trainer was asked for.
        own: The run's own folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        ConfigError: Weights to begin from are given twice.
    """
    resume = checkpoint_at(settings.resume_from, own)
    if resume is None:
        return None, settings.init_from
    if not resume.weights_only:
        return resume, None
    if settings.init_from is not None:
        raise ConfigError(
            f"resume_from={resume.path!r} holds weights alone, and init_from="
            f"{str(settings.init_from)!r} gives weights too: remove one of them"
        )
    return None, resume


def store_of(settings: Settings, path: Path, stack: ExitStack) -> CheckpointStore | None:
    """Where the run's checkpoints go; None where it is to write none."""
    wanted = settings.run.checkpoint_config
    if not (wanted.at_end or wanted.every_s or wanted.every_steps):
        return None
    store = CheckpointStore(wanted.storage or path / CHECKPOINTS, wanted)
    stack.callback(store.close)
    return store
