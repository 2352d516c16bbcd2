"""JSON files with a format number and a checksum, and how values of theirs are read with care.

A file is ``{"checksum": …, "index": {"format": 1, …}}``; the checksum (BLAKE2b, 128 bits) is that
of the compact JSON text of ``index``, with its keys in their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raypar.errors import CheckpointError, OptimizerError
from raypar.stages.plain import to_plain

FORMAT = 1
"""Number of the form of checkpoints that this raypar writes; it reads this one and older ones."""


class Reading:
    """Reads values of a file that anybody may have written."""

    def __init__(self, where: str) -> None:
        self._where = where

    def damaged(self, what: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"{self._where} is damaged: {what}")

    def opened(self, data: bytes) -> dict[str, Any]:
        """The inner object of a sealed file, checked.

        Raises:
            CheckpointError: It is damaged, or of a newer format.
        """
        try:
            raw = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"no JSON: {error}") from None
        if not isinstance(raw, dict) or set(raw) != {"checksum", "index"}:
            raise self.damaged("expected an object with 'checksum' and 'index'")
        inner = self.dict(raw["index"])
        number = inner.get("format")
        if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
            raise CheckpointError(
                f"{self._where} has format {number}, this raypar reads up to {FORMAT}: upgrade "
                f"raypar (it was written by {inner.get('versions')!r:.100})"
            )
        try:
            found = _digest(_compact(inner))
        except (ValueError, RecursionError) as error:
            raise self.damaged(str(error)) from None
        if found != raw["checksum"]:
            raise self.damaged(f"its checksum is {found}, expected {raw['checksum']!r:.60}")
        if number != FORMAT:
            raise self.damaged(f"format {number!r:.20}")
        return inner

    def dict(self, value: Any) -> dict[str, Any]:
        """A JSON object."""
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.damaged(f"expected an object, found {value!r:.80}")
        return value

    def list(self, value: Any) -> Sequence[Any]:
        """A JSON list."""
        if not isinstance(value, list):
            raise self.damaged(f"expected a list, found {value!r:.80}")
        return value

    def text(self, value: Any) -> str:
        """A JSON string."""
        if not isinstance(value, str):
            raise self.damaged(f"expected text, found {value!r:.80}")
        return value

    def count(self, value: Any) -> int:
        """A whole number of at least 0."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
            raise self.damaged(f"expected a number of at least 0, found {value!r:.80}")
        return value

    def counts(self, value: Any) -> tuple[int, ...]:
        """A list of such numbers."""
        return tuple(self.count(v) for v in self.list(value))


def seal(inner: dict[str, Any]) -> bytes:
    """A file of `inner`, with format number and checksum."""
    text = _compact({"format": FORMAT, **inner})
    return f'{{"checksum":"{_digest(text)}","index":{text}}}\n'.encode()


def plain(value: Any, where: str) -> Any:
    """`raypar.stages.plain.to_plain`, for checkpoints.

    Raises:
        CheckpointError: It cannot be held by a checkpoint.
    """
    try:
        return to_plain(value, where)
    except OptimizerError as error:
        raise CheckpointError(str(error)) from None


def _compact(inner: Mapping[str, Any]) -> str:
    return json.dumps(inner, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
