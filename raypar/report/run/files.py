"""The folder of a run as values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar.errors import ConfigError, RayparError
from raypar.plan import Plan
from raypar.report.run.predicted import Prediction, read_prediction
from raypar.report.run.writer import PREDICTED_FILE
from raypar.search.record import SearchRecord
from raypar.train.loggers.events import EVENTS_FILE
from raypar.train.metrics_file import is_step, read_lines
from raypar.train.timeline import TIMELINE_FILE, Timeline

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RunFiles:
    """What a run left behind.

    Attributes:
        name: Name of the folder.
        plan: ``plan.json``, or None.
        steps: Lines of ``metrics.jsonl`` that are of steps, in order.
        evaluations: Its other lines.
        events: Lines of ``events.jsonl``.
        result: ``result.json``, or None while the run goes on.
        record: ``search.json``, or None where no plan was searched.
        timeline: ``timeline.json``, or None.
        prediction: ``predicted.json``, or None.
        missing: What is not there, in words for the reader.
    """

    name: str
    plan: Plan | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    record: SearchRecord | None = None
    timeline: Timeline | None = None
    prediction: Prediction | None = None
    missing: tuple[str, ...] = ()


_MISSING = {
    "plan.json": "there is no plan.json: the run ended before it had a plan",
    METRICS_FILE: "there is no metrics.jsonl: no step was finished",
    "result.json": "there is no result.json: the run goes on, or was killed",
    TIMELINE_FILE: "there is no timeline.json: it is written once a minute and when a run ends; "
    "no measured step is drawn",
    PREDICTED_FILE: "there is no predicted.json: nothing is predicted beside what was measured",
}


def read_run(folder: Path) -> RunFiles:
    """Reads a run's folder; files that are not there are told in `RunFiles.missing`.

    Raises:
        ConfigError: It is no run's folder, or a file in it is damaged; names the file.
    """
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is no folder: give the folder of a run, as runs/NAME")
    if not any((folder / name).exists() for name in ("plan.json", METRICS_FILE, "result.json")):
        raise ConfigError(
            f"{str(folder)!r} holds none of plan.json, {METRICS_FILE} and result.json: give the "
            "folder of a run, as runs/NAME"
        )

    def path(name: str) -> Path | None:
        return folder / name if (folder / name).exists() else None

    metrics, events = path(METRICS_FILE), path(EVENTS_FILE)
    plan, timeline, predicted = path("plan.json"), path(TIMELINE_FILE), path(PREDICTED_FILE)
    lines = read_lines(metrics) if metrics else []
    for line in lines:
        _check_line(line, folder / METRICS_FILE)
    return RunFiles(
        folder.resolve().name,
        _plan(plan) if plan else None,
        [line for line in lines if is_step(line)],
        [line for line in lines if not is_step(line)],
        read_lines(events) if events else [],
        _result(folder / "result.json"),
        _record(folder / "search.json"),
        _timeline(timeline) if timeline else None,
        read_prediction(predicted) if predicted else None,
        tuple(words for name, words in _MISSING.items() if path(name) is None),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None


def _plan(path: Path) -> Plan:
    try:
        return Plan.load(path)
    except RayparError as error:
        raise ConfigError(str(error)) from None


def _timeline(path: Path) -> Timeline:
    try:
        return Timeline.from_json(_text(path))
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from None


def _record(path: Path) -> SearchRecord | None:
    if not path.exists():
        return None
    try:
        return SearchRecord.from_json(_text(path))
    except RayparError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from None


def _result(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{str(path)!r}: a JSON object is expected")
    return found


def _check_line(line: dict[str, Any], path: Path) -> None:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigError(f"{str(path)!r}: a line has step {step!r}: it is damaged")
    seconds = line.get("step_s", 1.0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ConfigError(f"{str(path)!r}: step {step} has step_s {seconds!r}: it is damaged")
    for key in ("breakdown", "slowest", "memory"):
        if not isinstance(line.get(key, {}), dict):
            raise ConfigError(f"{str(path)!r}: step {step} has {key} {line[key]!r:.80}")
