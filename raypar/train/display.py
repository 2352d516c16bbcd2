"""What a run shows while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_QUIET_S = 20.0
"""Without a terminal, seconds between lines on how far something is."""


class Display:
    """A progress bar on a terminal; elsewhere one plain line every `every` steps.

    Args:
        total: Steps of the run; None where only the end of the data tells.
        every: Steps between plain lines; 0 shows nothing at all.
        stream: Where to; standard output by default.
    """

    def __init__(self, total: int | None, every: int, stream: TextIO | None = None) -> None:
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

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows one step's line."""
        if not self._every:
            return
        text = _text(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"] + 1, text=text)
            return
        number = line["step"] + 1
        if number == 1 or number % self._every == 0 or number == self._total:
            of = "" if self._total is None else f"/{self._total}"
            print(f"step {number}{of}  {text}", file=self._stream, flush=True)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Shows an evaluation: ``step`` (steps done) and its metrics."""
        figures = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {_figure(value)}"
            for name, value in line.items()
            if name != "step"
        ]
        self.say(f"evaluation after step {line['step']}  {'  '.join(figures)}")

    def checkpoint(self, path: str, step: int) -> None:
        """Tells of a checkpoint that was begun."""
        self.say(f"checkpoint after step {step}  {path}")

    def say(self, text: str) -> None:
        """Prints one line of text, unless nothing is to be shown."""
        if not self._every:
            return
        if self._bar is not None:  # above the bar, which stays the last line
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def doing(self, text: str) -> Iterator[Callable[[str], None]]:
        """Tells what goes on, before the first step: on a terminal only for as long as it does.

        Yields:
            A function that is told how far it is: on a terminal that is shown at once, elsewhere
            in a line of its own now and then.
        """
        if self._bar is None:
            self.say(text)
            last = time.monotonic()

            def say(more: str) -> None:
                nonlocal last
                if time.monotonic() - last >= _QUIET_S:
                    last = time.monotonic()
                    self.say(f"{text}: {more}")

            yield say
        else:
            with self._bar.console.status(Text(text)) as status:
                yield lambda more: status.update(
                    Text(f"{text}: {more}", overflow="ellipsis", no_wrap=True)
                )

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


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(line: Mapping[str, Any]) -> str:
    loss, norm = line["loss"], line["grad_norm"]
    parts = [f"loss {loss:.4f}" if isinstance(loss, float) else f"loss {loss}"]
    if isinstance(norm, float):
        parts.append(f"grad norm {norm:.3g}")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    else:
        parts.append(f"{line['samples_per_s']:,.0f} samples/s")
    parts.append(f"{1000 * line['step_s']:.0f} ms")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    return "  ".join(parts)
