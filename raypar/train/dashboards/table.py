"""Every metric that goes out to loggers, gauges and dashboards: one table for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from raypar.train.breakdown import PARTS


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: What loggers call it, after its group: ``train/loss``; the gauge is ``raypar_loss``.
        group: Which metrics belong together: one row of the dashboard.
        title: Heading of its panel.
        meaning: What it is.
        unit: As Grafana calls it (``s``, ``bytes``, ``percentunit``, ``short``).
        key: Where a line of ``metrics.jsonl`` holds it.
        tag: Where the line holds several, what tells them apart (``part``, ``stage``).
        inner: Where each of several is an object, the key in it.
    """

    name: str
    group: str
    title: str
    meaning: str
    unit: str
    key: str
    tag: str = ""
    inner: str = ""

    @property
    def gauge(self) -> str:
        """Name of the gauge that the run sets; Ray exports it as ``ray_`` and this."""
        return f"raypar_{self.name}"

    def values(self, line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """(value of the tag or empty, number) for all that a line holds of it; finite ones."""
        found = line.get(self.key)
        if not self.tag:
            if _is_number(found):
                yield "", float(found)
        elif isinstance(found, Mapping):
            for tag, value in found.items():
                own = value.get(self.inner) if self.inner else value
                if _is_number(own):
                    yield str(tag), float(own)


METRICS = (
    Metric("step", "train", "Steps", "optimizer steps done", "short", "steps_done"),
    Metric("loss", "train", "Loss", "global loss of the step", "short", "loss"),
    Metric("eval_loss", "train", "Evaluation loss", "loss on the evaluation data", "short",
           "eval_loss"),
    Metric("grad_norm", "train", "Gradient norm", "global norm before clipping", "short",
           "grad_norm"),
    Metric("lr", "train", "Learning rate", "of the first parameter group", "short", "lr"),
    Metric("tokens_per_s", "speed", "Tokens per second", "of the whole run", "short",
           "tokens_per_s"),
    Metric("samples_per_s", "speed", "Samples per second", "of the whole run", "short",
           "samples_per_s"),
    Metric("step_s", "speed", "Step time", "seconds of an optimizer step", "s", "step_s"),
    Metric("mfu", "speed", "MFU", "model FLOPs per second, as a share of what the devices could do",
           "percentunit", "mfu"),
    Metric("part_s", "speed", "Parts of the step",
           f"mean of all ranks; they add up to the step: {', '.join(PARTS)}", "s", "breakdown",
           "part"),
    Metric("held_bytes", "memory", "Memory between steps",
           "what the fullest rank of a stage holds from step to step", "bytes", "memory", "stage",
           "held"),
    Metric("peak_bytes", "memory", "Memory at its peak",
           "the same, with what it keeps from forward to backward", "bytes", "memory", "stage",
           "peak"),
)  # fmt: skip
"""In the order in which dashboards show them."""


def numbered(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with ``steps_done``: a step's line has its own 0-based number, others tell that."""
    step = line.get("step")
    done = step + 1 if isinstance(step, int) and "step_s" in line else step
    return {**line, "steps_done": done}


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a line by the names that loggers give them.

    Metrics of the table, as ``train/loss`` and ``speed/part_s/bubble``; what else an evaluation
    tells, as ``eval/accuracy``.
    """
    found: dict[str, float] = {}
    known = {metric.key for metric in METRICS}
    for metric in METRICS:
        if metric.key == "steps_done":  # the axis of all the others
            continue
        for tag, value in metric.values(line):
            name = f"{metric.group}/{metric.name}"
            found[f"{name}/{tag}" if tag else name] = value
    for key, value in line.items():
        if key.startswith("eval_") and key not in known and _is_number(value):
            found[f"eval/{key.removeprefix('eval_')}"] = float(value)
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)
