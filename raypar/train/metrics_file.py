"""``metrics.jsonl`` and other files of one JSON object per line: how they are read again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raypar.errors import ConfigError


def read_lines(path: Path, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """Every line as a dict.

    A last line that was cut off, as by a killed process, is left out.

    Args:
        path: The file.
        damaged: Gets the numbers (from 1) of the lines that are no JSON object, which are then
            left out; without it they are an error.

    Raises:
        ConfigError: The file cannot be read, or another line is no JSON object; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="strict" if damaged is None else "replace")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
    lines = text.split("\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no line feed behind it: the writer was stopped in it
                break
            if damaged is not None:
                damaged.append(number)
                continue
            raise ConfigError(f"{str(path)!r}, line {number} is damaged: {error}") from None
        if not isinstance(value, dict):
            if damaged is not None:
                damaged.append(number)
                continue
            raise ConfigError(f"{str(path)!r}, line {number}: a JSON object is expected")
        found.append(value)
    return found


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Inside, a file of a run's folder is written; says so where it cannot be, as on a full disk.

    Raises:
        ConfigError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {str(folder)!r}: {error.strerror}; make room there, or set "
            "storage_path to another folder. What was saved in checkpoints can be resumed"
        ) from error


def is_step(line: dict[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` is of an optimizer step; others are evaluations."""
    return "step_s" in line


def keep_before(path: Path, step: int) -> None:
    """Drops the lines of steps from `step` on: a run that goes on there writes them again.

    The new file takes the old one's place at once, so that a crash leaves one of them whole. Lines
    that were damaged, as by a power failure, are left out with a warning: no training is lost for
    the sake of its log.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    if not path.exists():
        return

    def before(line: dict[str, Any]) -> bool:
        number = line.get("step")
        # An evaluation names how many steps were done, a step its own 0-based number.
        return isinstance(number, int) and number < step + (0 if is_step(line) else 1)

    damaged: list[int] = []
    kept = [line for line in read_lines(path, damaged) if before(line)]
    if damaged:
        warnings.warn(
            f"{str(path)!r}: {len(damaged)} damaged lines are left out, the first is line "
            f"{damaged[0]}",
            stacklevel=2,
        )
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from None
