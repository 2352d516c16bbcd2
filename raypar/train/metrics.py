"""What a run writes step by step: ``metrics.jsonl``, and ``timeline.json`` of its last steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from raypar.stages.faults import RankInfo
from raypar.stages.run import StepResult
from raypar.stages.spec import RankSpec, StepReport
from raypar.train.breakdown import PARTS, Breakdown, RankLists, busiest
from raypar.train.data import BatchForm
from raypar.train.display import Display
from raypar.train.metrics_file import keep_before, told
from raypar.train.timeline import TimelineRecorder

__all__ = ["Display", "MetricsLog", "startup_text", "tokens_of"]

_FLUSH_S, _TIMELINE_S = 1.0, 60.0
_MANY_RANKS = 4
_EVERY = 10


def tokens_of(form: BatchForm) -> int | None:
    """Tokens of one global batch, if it is one of tokens.

    These are the elements of its first integer tensor of two dims, of which one is the batch dim.
    """
    for shape, dtype, dim in zip(
        form.spec.shapes, form.spec.dtypes, form.spec.batch_dims, strict=True
    ):
        if len(shape) == 2 and dim is not None and dtype in (torch.int64, torch.int32):
            return math.prod(shape)
    return None


class MetricsLog:
    """Writes ``metrics.jsonl``, one line per step, and keeps the totals.

    A line holds ``step`` (0-based), ``time`` (Unix time in seconds), ``loss``, ``grad_norm``,
    ``lr`` (of the first parameter group), ``step_s``, ``tokens_per_s``, ``samples_per_s``, ``mfu``
    (`raypar.train.utilisation`), ``breakdown`` (part → seconds, the mean of all ranks; they add up
    to ``step_s``: `raypar.train.breakdown`), ``slowest`` (the rank that has most to do itself, and
    its parts), ``memory`` (in a run's first line: per stage what its fullest rank holds from step
    to step, for all of its stages, and at its peak, in bytes) and ``ranks`` (every rank's own
    times; of more than 4 ranks in every tenth line). Where a figure is not known its key is not
    there. Lines of evaluations lack ``step_s``.

    Once a minute, and when it is closed, ``timeline.json`` beside it tells when every rank did what
    in the last steps.

    Args:
        path: The file; lines from `first_step` on are dropped, those before it stay.
        samples: Samples of a step.
        tokens: Tokens of a step, if they are known.
        infos: The ranks.
        specs: What the ranks do: tells waiting for others from communication.
        model_flops: FLOPs of a step (`raypar.train.utilisation.model_flops`).
        peak_flops: FLOP/s of all devices at best (`raypar.train.utilisation.peak_flops`).
        first_step: The first step that will be added.

    Raises:
        ConfigError: An existing file, which a run goes on with, is damaged.
    """

    def __init__(
        self,
        path: Path,
        samples: int,
        tokens: int | None,
        infos: Sequence[RankInfo],
        *,
        specs: Sequence[RankSpec] = (),
        model_flops: float | None = None,
        peak_flops: float | None = None,
        first_step: int = 0,
    ) -> None:
        if first_step:
            keep_before(path, first_step)
        self._folder = path.parent
        with told(self._folder):
            self._file: TextIO = path.open("a" if first_step else "w", encoding="utf-8")
        self._samples = samples
        self._tokens = tokens
        self._infos = list(infos)
        self._mfu = model_flops / peak_flops if model_flops and peak_flops else None
        nodes = [info.node for info in self._infos]
        lists = RankLists.of(specs, nodes) if specs else RankLists((), (), ())
        self._breakdown = Breakdown(lists)
        self._recorder = TimelineRecorder(self._breakdown, self._infos)
        self._flushed = self._recorded = time.monotonic()
        self.last: StepResult | None = None
        self.steps = 0
        self.seconds = 0.0
        self._first_s = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)

    def add(self, result: StepResult) -> dict[str, Any]:
        """Writes one step and returns its line."""
        seconds = max(result.seconds, 1e-9)
        parts = self._breakdown.parts(result.ranks, seconds)
        mean = dict(zip(PARTS, parts.mean(axis=0).tolist(), strict=True))
        line: dict[str, Any] = {
            "step": result.step,
            "time": round(time.time(), 3),
            "loss": _number(result.loss),
            "grad_norm": _number(result.grad_norm),
            **_learning_rate(result),
            "step_s": round(seconds, 6),
            **self._rate(seconds),
            "breakdown": _rounded(mean),
            "slowest": self._slowest(parts),
        }
        memory = self._memory(result.ranks)
        if memory:
            line["memory"] = memory
        if len(result.ranks) <= _MANY_RANKS or self.steps % _EVERY == 0:
            line["ranks"] = self._ranks(result.ranks)
        if not result.applied:
            line["non_finite"] = list(result.non_finite)
        self._write(line)
        self._recorder.add(result.step, result.ranks)
        if time.monotonic() - self._recorded > _TIMELINE_S:
            with told(self._folder):
                self._recorder.write(self._folder)
            self._recorded = time.monotonic()
        self._count(result, seconds, mean)
        return line

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Writes an evaluation: ``step`` (steps done) and its metrics."""
        self._write(
            {k: _number(v) if isinstance(v, float) else v for k, v in line.items() if k != "step_s"}
        )

    def flush(self) -> None:
        """Has what was written outlive this process.

        Raises:
            ConfigError: It cannot be written.
        """
        with told(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def _write(self, line: Mapping[str, Any]) -> None:
        with told(self._folder):
            self._file.write(json.dumps(line) + "\n")
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def _slowest(self, parts: np.ndarray) -> dict[str, Any]:
        rank = busiest(parts)
        return {
            "rank": self._infos[rank].rank,
            **_rounded(dict(zip(PARTS, parts[rank].tolist(), strict=True))),
        }

    def _ranks(self, reports: Sequence[StepReport]) -> list[dict[str, Any]]:
        return [
            {
                "rank": info.rank,
                "stages": list(info.stages),
                "seconds": _rounded(report.seconds),
                "peak_saved_bytes": {str(k): v for k, v in report.peak_saved.items()},
            }
            for info, report in zip(self._infos, reports, strict=True)
        ]

    def _memory(self, reports: Sequence[StepReport]) -> dict[str, dict[str, int]]:
        """Stage → bytes that its fullest rank holds, and the same at its peak."""
        found: dict[str, dict[str, int]] = {}
        for info, report in zip(self._infos, reports, strict=True):
            held = report.held.get("total")
            if held is None:
                continue
            for stage in info.stages:
                own = found.setdefault(str(stage), {"held": 0, "peak": 0})
                own["held"] = max(own["held"], held)
                own["peak"] = max(own["peak"], held + report.most_saved)
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    def _count(self, result: StepResult, seconds: float, parts: Mapping[str, float]) -> None:
        self.last = result
        self.steps += 1
        self.seconds += seconds
        if self.steps == 1:
            self._first_s = seconds
            return
        for name, own in parts.items():
            self._parts[name] += own

    def summary(self) -> dict[str, Any]:
        """Totals; rates leave the first step out where there are more, since it warms up.

        ``breakdown`` is part → share of the step, over all steps but the first.
        """
        if self.last is None:
            return {"steps": 0}
        steps, seconds = self.steps, self.seconds
        if steps > 1:
            steps, seconds = steps - 1, seconds - self._first_s
        whole = sum(self._parts.values())
        shares = {k: round(v / whole, 4) for k, v in self._parts.items()} if whole else None
        return {
            "steps": self.steps,
            "loss": _number(self.last.loss),
            "grad_norm": _number(self.last.grad_norm),
            "seconds": self.seconds,
            "step_s": seconds / steps,
            **self._rate(seconds / steps),
            **({"breakdown": shares} if shares else {}),
        }

    def _rate(self, seconds: float) -> dict[str, float]:
        rates = {"samples_per_s": round(self._samples / seconds, 3)}
        if self._tokens is not None:
            rates = {"tokens_per_s": round(self._tokens / seconds, 3), **rates}
        if self._mfu is not None:
            rates["mfu"] = round(self._mfu / seconds, 5)
        return rates

    def close(self) -> None:
        """Closes the file and writes ``timeline.json``; safe to call twice.

        Raises:
            ConfigError: They cannot be written.
        """
        if not self._file.closed:
            with told(self._folder):
                self._file.close()
                self._recorder.write(self._folder)


def _learning_rate(result: StepResult) -> dict[str, float]:
    known = [report.lr for report in result.ranks if report.lr is not None]
    return {"lr": known[0]} if known else {}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(own, 6) for name, own in seconds.items()}


def startup_text(startup: Mapping[str, float]) -> str:
    """The breakdown of ``Result.metrics["startup"]``, one line per part, for people."""
    total = startup.get("total", 0.0)
    lines = [f"{total:6.2f} s from the call of fit() to the end of the first step"]
    for name, seconds in startup.items():
        if name != "total":
            depth = name.count(".")
            lines.append(f"{'  ' * (depth + 1)}{seconds:6.2f} s {name.rsplit('.', 1)[-1]}")
    return "\n".join(lines)


def _number(value: float | None) -> float | str | None:
    """A number that JSON can hold: NaN and infinities as text."""
    if value is None or math.isfinite(value):
        return value
    return str(value)
