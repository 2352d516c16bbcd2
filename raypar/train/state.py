"""What a resume needs beside tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from raypar.errors import ConfigError


@dataclass(frozen=True)
class TrainState:
    """Where a run stands between two steps; plain JSON values.

    Attributes:
        step: Optimizer steps done, and so the number of the next one.
        samples: Samples read from the training data.
        data: Position in the training data (`raypar.train.data`).
        metrics: The last line of metrics, with those of the last evaluation.
        seconds: Training time so far, over all attempts.
        extra: Whatever else a part of the trainer keeps (early stopping, say), by its name.
    """

    step: int = 0
    samples: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what `to_json` gave.

        Raises:
            ConfigError: It is something else.
        """
        known = {"step": int, "samples": int, "data": dict, "metrics": dict, "extra": dict}
        if not isinstance(value, dict) or not set(value) <= {*known, "seconds"}:
            raise ConfigError(f"no training state: expected {sorted(known)}, found {value!r:.200}")
        for name, kind in known.items():
            if name in value and (
                not isinstance(value[name], kind) or isinstance(value[name], bool)
            ):
                raise ConfigError(
                    f"training state: {name} is {value[name]!r:.100}, expected {kind.__name__}"
                )
        if value.get("step", 0) < 0 or value.get("samples", 0) < 0:
            raise ConfigError("training state: step and samples are at least 0")
        return cls(**value)
