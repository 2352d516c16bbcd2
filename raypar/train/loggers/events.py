"""``events.jsonl``: what happened in a run beside its steps, one JSON object a line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from raypar.train.callbacks import Callback, RunFacts
from raypar.train.metrics_file import told

EVENTS_FILE = "events.jsonl"


class EventLog(Callback):
    """Appends ``start``, ``checkpoint``, ``evaluation``, ``end`` and whatever else is told.

    Every line has ``time`` (Unix time in seconds), ``kind``, ``step`` (steps done) and ``text``. A
    run that begins anew writes the file anew; one that goes on appends.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._begun = False
        self._step = 0
        self._early: list[str] = []  # what happened before the folder was known

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`."""
        self._path = run.folder / EVENTS_FILE
        self._step = run.first_step
        if run.first_step == 0 and not self._begun:
            self._path.unlink(missing_ok=True)
        self._begun = True
        ranks = f"{len(run.infos)} rank{'s' * (len(run.infos) != 1)}"
        self._add("start", run.first_step, f"on {ranks} of cluster {run.cluster.name!r}")

    def on_step(self, line: dict[str, Any]) -> None:
        """See `Callback.on_step`."""
        self._step = line["step"] + 1

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See `Callback.on_evaluation`."""
        figures = [
            f"{key.removeprefix('eval_')} {value:.6g}"
            for key, value in line.items()
            if key.startswith("eval_") and isinstance(value, (int, float))
        ]
        self._add("evaluation", line.get("step", self._step), ", ".join(figures))

    def on_checkpoint(self, path: str, step: int) -> None:
        """See `Callback.on_checkpoint`."""
        self._add("checkpoint", step, path)

    def on_event(self, event: dict[str, Any]) -> None:
        """See `Callback.on_event`."""
        step = event.get("step")
        self._add(
            str(event.get("kind", "event")),
            step if isinstance(step, int) else self._step,
            str(event.get("text", "")),
        )

    def on_end(self, result: dict[str, Any]) -> None:
        """See `Callback.on_end`."""
        error = result.get("error")
        self._add("end", self._step, str(error) if error else "finished")

    def _add(self, kind: str, step: int, text: str) -> None:
        line = {"time": round(time.time(), 3), "kind": kind, "step": step, "text": text}
        self._early.append(json.dumps(line) + "\n")
        if self._path is None:  # nothing has begun: there is no folder yet
            return
        with told(self._path.parent), self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._early)
        self._early.clear()
