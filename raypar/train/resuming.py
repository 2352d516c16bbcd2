"""Where a run's checkpoints lie, and which one it goes on from."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

from raypar.errors import CheckpointError, ConfigError
from raypar.train._run_lock import locked
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.settings import Settings

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints in the run's own."""


def checkpoint_at(
    where: Checkpoint | str | Path | None, own: Path, storage: str | Path | None = None
) -> Checkpoint | None:
    """The checkpoint that a user means.

    Args:
        where: A checkpoint, its path or URL, the folder of a run, or ``"auto"``.
        own: The run's own folder.
        storage: Where the run keeps its checkpoints, if not in its own folder.

    Raises:
        CheckpointError: There is none (unless ``"auto"`` was meant), or it is damaged.
    """
    if where is None or isinstance(where, Checkpoint):
        return where
    if where == "auto":
        folder = own / CHECKPOINTS if storage is None else storage
        there = "://" in str(folder) or Path(folder).is_dir()
        return CheckpointStore(folder).latest() if there else None
    inside = Path(where) / CHECKPOINTS
    if "://" in str(where) or not inside.is_dir():
        if (Path(where) / "plan.json").is_file():
            raise CheckpointError(
                f"run {str(where)!r} has no checkpoints in {str(inside)!r}: it ended before its "
                "first one, or keeps them elsewhere (checkpoint.storage), and then give that folder"
            )
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
    kept = settings.run.checkpoint_config.storage
    resume = checkpoint_at(settings.resume_from, own, kept)
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
    """Where the run's checkpoints go; None where it is to write none.

    Those of an earlier run of the same name are set aside: they would count as this run's. In a
    storage of its own they stay, and do not count, unless this run goes on from one.

    Raises:
        CheckpointError: They cannot be written there.
        ConfigError: Another run writes there.
    """
    wanted = settings.run.checkpoint_config
    earlier = path / CHECKPOINTS
    if settings.resume_from is None and settings.init_from is None and earlier.is_dir():
        earlier.rename(_free(path, f"{CHECKPOINTS}-before"))
    if not (wanted.at_end or wanted.every_s or wanted.every_steps):
        return None
    store = CheckpointStore(wanted.storage or path / CHECKPOINTS, wanted)
    stack.callback(store.close)
    if wanted.storage is not None:  # the run's own folder was tried, and locked, already
        store.check()
        storage = Path(wanted.storage).expanduser()
        if "://" not in str(wanted.storage) and storage.resolve() != path.resolve():
            # Two writers would drop, and sweep away, what the other one has.
            stack.enter_context(locked(storage, tell=_in_use))
    if settings.resume_from is None:
        store.ignore_present()
    return store


def _in_use(storage: Path, holder: str) -> str:
    return (
        f"checkpoint storage {str(storage)!r} is in use: {holder} writes there. Wait for its end "
        "or stop it, or set another checkpoint.storage (CheckpointConfig.storage), for example "
        f"{str(storage) + '-2'!r}"
    )


def _free(folder: Path, name: str) -> Path:
    """A path in `folder` that does not exist: ``<name>-1``, ``<name>-2``, ..."""
    return next(p for i in itertools.count(1) if not (p := folder / f"{name}-{i}").exists())
