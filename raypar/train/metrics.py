"""What a run writes and shows step by step."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raypar.stages.faults import RankInfo
from raypar.stages.run import StepResult
from raypar.train.data import BatchForm

_FLUSH_S = 1.0


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

    Args:
        path: The file; an existing one is overwritten.
        samples: Samples of a step.
        tokens: Tokens of a step, if they are known.
        infos: The ranks.
    """

    def __init__(
        self, path: Path, samples: int, tokens: int | None, infos: Sequence[RankInfo]
    ) -> None:
        self._file: TextIO = path.open("w")
        self._samples = samples
        self._tokens = tokens
        self._infos = list(infos)
        self._flushed = time.monotonic()
        self.last: StepResult | None = None
        self.steps = 0
        self.seconds = 0.0
        self._first_s = 0.0

    def add(self, result: StepResult) -> dict[str, Any]:
        """Writes one step and returns its line."""
        seconds = max(result.seconds, 1e-9)
        line: dict[str, Any] = {
            "step": result.step,
            "loss": _number(result.loss),
            "grad_norm": _number(result.grad_norm),
            "step_s": round(seconds, 6),
            **self._rate(seconds),
            "ranks": [
                {
                    "rank": info.rank,
                    "stages": list(info.stages),
                    "seconds": {k: round(v, 6) for k, v in report.seconds.items()},
                    "peak_saved_bytes": {str(k): v for k, v in report.peak_saved.items()},
                }
                for info, report in zip(self._infos, result.ranks, strict=True)
            ],
        }
        if not result.applied:
            line["non_finite"] = list(result.non_finite)
        self._file.write(json.dumps(line) + "\n")
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()
        self.last = result
        self.steps += 1
        self.seconds += seconds
        if self.steps == 1:
            self._first_s = seconds
        return line

    def summary(self) -> dict[str, Any]:
        """Totals; rates leave the first step out where there are more, since it warms up."""
        if self.last is None:
            return {"steps": 0}
        steps, seconds = self.steps, self.seconds
        if steps > 1:
            steps, seconds = steps - 1, seconds - self._first_s
        return {
            "steps": self.steps,
            "loss": _number(self.last.loss),
            "grad_norm": _number(self.last.grad_norm),
            "seconds": self.seconds,
            "step_s": seconds / steps,
            **self._rate(seconds / steps),
        }

    def _rate(self, seconds: float) -> dict[str, float]:
        rates = {"samples_per_s": self._samples / seconds}
        if self._tokens is not None:
            rates = {"tokens_per_s": self._tokens / seconds, **rates}
        return {k: round(v, 3) for k, v in rates.items()}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def startup_text(startup: Mapping[str, float]) -> str:
    """The breakdown of ``Result.metrics["startup"]``, one line per part, for people."""
    total = startup.get("total", 0.0)
    lines = [f"{total:6.2f} s from the call of fit() to the end of the first step"]
    for name, seconds in startup.items():
        if name != "total":
            depth = name.count(".")
            lines.append(f"{'  ' * (depth + 1)}{seconds:6.2f} s {name.rsplit('.', 1)[-1]}")
    return "\n".join(lines)


class Display:
    """A progress bar on a terminal; elsewhere one plain line every `every` steps.

    Args:
        total: Steps of the run.
        every: Steps between plain lines; 0 shows nothing at all.
        stream: Where to; standard output by default.
    """

    def __init__(self, total: int, every: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._every = every
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None
        self._task: Any = None
        if every and self._stream.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=total, text="")

    def show(self, line: dict[str, Any]) -> None:
        """Shows one step's line."""
        if not self._every:
            return
        text = _text(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"] + 1, text=text)
            return
        number = line["step"] + 1
        if number == 1 or number % self._every == 0 or number == self._total:
            print(f"step {number}/{self._total}  {text}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Prints one line of text, unless nothing is to be shown."""
        if self._every:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _text(line: dict[str, Any]) -> str:
    loss, norm = line["loss"], line["grad_norm"]
    parts = [f"loss {loss:.4f}" if isinstance(loss, float) else f"loss {loss}"]
    if isinstance(norm, float):
        parts.append(f"grad norm {norm:.3g}")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    else:
        parts.append(f"{line['samples_per_s']:,.0f} samples/s")
    parts.append(f"{1000 * line['step_s']:.0f} ms")
    return "  ".join(parts)


def _number(value: float | None) -> float | str | None:
    """A number that JSON can hold: NaN and infinities as text."""
    if value is None or math.isfinite(value):
        return value
    return str(value)
