"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raypar.errors import CheckpointError


@contextmanager
def whole_folder(target: Path, name: str) -> Iterator[Path]:
    """Gives a folder to write to, which becomes `target` at the end, unless something failed.

    Args:
        target: Where it will be; absolute, and not there yet.
        name: What the user calls it, for the error.

    Raises:
        CheckpointError: It cannot be written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        part.mkdir(parents=True)
        yield part
        os.rename(part, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {name!r}: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
