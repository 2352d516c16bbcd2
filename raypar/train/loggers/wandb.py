"""Weights & Biases: a run of project ``WANDB_PROJECT``, or ``raypar``."""

from __future__ import annotations

import os
import secrets
from typing import Any

from raypar.train.callbacks import RunFacts
from raypar.train.dashboards.table import scalars
from raypar.train.loggers.base import Logger, imported

_ID_FILE = "wandb.id"


class WandbLogger(Logger):
    """Logs metrics, the configuration and the plan.

    Where to, and whether online, is W&B's own business (``WANDB_MODE``, ``WANDB_API_KEY``).

    Args:
        project: Name of the project; default: ``WANDB_PROJECT``, else ``raypar``.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str | None = None) -> None:
        super().__init__("wandb")
        self._wandb = imported("wandb", "wandb", "wandb")
        self._project = project or os.environ.get("WANDB_PROJECT") or "raypar"
        self._run: Any = None

    def _open(self, run: RunFacts) -> None:
        file = run.folder / _ID_FILE
        goes_on = bool(run.first_step) and file.exists()
        own = file.read_text(encoding="utf-8").strip() if goes_on else secrets.token_hex(4)
        file.write_text(own + "\n", encoding="utf-8")
        self._run = self._wandb.init(
            project=self._project,
            name=run.name,
            id=own,
            resume="allow" if goes_on else None,
            dir=str(run.folder),
            config=run.config,
            settings=self._wandb.Settings(silent=True),
        )
        self._run.summary["plan"] = run.plan.explain()
        self._run.define_metric("steps_done")
        self._run.define_metric("*", step_metric="steps_done")

    def _write(self, line: dict[str, Any]) -> None:
        # Its own step must rise, which those of a resumed run need not: ours is a metric.
        self._run.log({"steps_done": line["steps_done"], **scalars(line)})

    def _note(self, text: str, step: int) -> None:
        self._run.summary[f"event.{step}"] = text

    def _close(self, result: dict[str, Any]) -> None:
        self._run.finish(exit_code=1 if result.get("error") else 0)
