"""TensorBoard: event files under ``<run>/tensorboard``."""

from __future__ import annotations

import json
from typing import Any

from raypar.train.callbacks import RunFacts
from raypar.train.dashboards.table import scalars
from raypar.train.loggers.base import Logger, imported


class TensorBoardLogger(Logger):
    """Writes scalars, events and the plan for ``tensorboard --logdir <storage_path>``.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        super().__init__("tensorboard")
        imported("tensorboard", "tensorboard", "tensorboard")
        self._writer: Any = None

    def _open(self, run: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of steps that a resumed run does again, what it wrote before is hidden.
        purge = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("plan", _block(run.plan.explain()))
        if run.config:
            self._writer.add_text("config", _block(json.dumps(run.config, indent=1, default=str)))

    def _write(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["steps_done"], line.get("time"))

    def _note(self, text: str, step: int) -> None:
        self._writer.add_text("events", text, step)

    def _close(self, result: dict[str, Any]) -> None:
        self._writer.close()


def _block(text: str) -> str:
    """Markdown that keeps its lines."""
    return "\n".join(f"    {line}" for line in text.splitlines())
