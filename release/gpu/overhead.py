"""What the interpreter costs the host per instruction, where it waits, and gaps on the device.

    python release/gpu/overhead.py [--out DIR]
    python release/gpu/overhead.py --device cpu --smoke

- *per instruction*: a rank's step whose programs do nothing but hand back tensors made before: what
  is left is the interpreter. Told by kind of instruction: the last two, which reduce the norm and
  update the parameters, do work of their own.
- *syncs*: CUDA's own debug mode tells every call that makes the host wait for the device, with its
  line. Those of a step's end (its norm and loss are read there) are expected, others are not.
- *gaps*: the profiler's kernels of some steps in order; a gap is the time between the end of all
  before and the begin of the next.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import raypar
from raypar.programs.codegen import Program
from release.gpu import kit
from release.gpu.models import SHAPES, SMOKE, Shape
from release.gpu.solo import Solo, solo_plan

GAP_S = 50e-6
PER_INSTRUCTION_S = 30e-6
PROFILED = 3
MICROBATCHES = 4


class Replay:
    """A program that hands back what it once made, and feeds its sink with what it once fed."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._results: list[Any] | None = None
        self._sunk: list[tuple[int, torch.Tensor]] = []

    def __call__(self, box: list[Any], sink: Any = None) -> list[Any]:
        """As the program, but for the work."""
        if self._results is None:
            self._results = self._program(box, lambda i, value: self._sunk.append((i, value)))
        box.clear()
        for index, value in self._sunk:
            sink(index, value)
        return list(self._results)


def per_instruction(solo: Solo, steps: int) -> dict[str, Any]:
    """Seconds of the interpreter alone: by kind of instruction, and CPU seconds over all."""
    for stage in solo.runner._holdings.stages.values():
        stage.program.forward = Replay(stage.program.forward)
        stage.program.backward = Replay(stage.program.backward)
    kinds = [now.kind.name for now in solo.spec.instructions]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    began = time.process_time()
    for step in range(steps):
        solo.step(step)
        assert solo.last is not None
        stamps = array("d", solo.last.stamps)
        for kind, before, after in zip(kinds, stamps, stamps[1:], strict=False):
            found[kind].append(after - before)
    cpu = (time.process_time() - began) / steps / len(kinds)
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    return {"instructions": len(kinds), "cpu_s": cpu, "medians": medians}


def syncs(solo: Solo) -> dict[str, int]:
    """``file:line`` → how often a step waited there for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solo.step(50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [w for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told))


def gaps(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """Times in which nothing ran, between the first and the last of some (begin, end)."""
    ordered = sorted(intervals)
    ends = itertools.accumulate((end for _, end in ordered), max)
    return [max(0.0, b - end) for end, (b, _) in zip(ends, ordered[1:], strict=False)]


def profiled(solo: Solo, device: str) -> list[tuple[float, float]]:
    """(begin, end) in seconds of what ran on the device in some steps."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as run:
        for index in range(PROFILED):
            solo.step(60 + index)
        kit.settle(device)
    wanted = "CUDA" if on_gpu else "CPU"
    return [
        (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        for event in run.events()
        if event.device_type.name == wanted
    ]


def figures_of(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    batch = shape.data()
    graph = raypar.capture(shape.model, batch)
    plan = solo_plan(graph, options.device, MICROBATCHES)
    found: dict[str, Any] = {}
    engines: tuple[Any, ...] = ("eager", "cuda_graph") if options.device == "cuda" else ("eager",)
    for engine in engines:
        solo = Solo(graph, plan, batch, options.device, engine)
        kit.step_times(solo.step, options.device, 0, 4)
        waits = syncs(solo) if options.device == "cuda" else {}
        busy = profiled(solo, options.device)
        empty = gaps(busy)
        span = max(e for _, e in busy) - min(b for b, _ in busy)
        found[engine] = {
            "syncs": waits,
            "kernels": len(busy),
            "gaps": kit.spread(empty),
            "long_gaps": sum(g > GAP_S for g in empty),
            "long_gaps_per_step": sum(g > GAP_S for g in empty) / PROFILED,
            "idle_share": sum(empty) / span,
        }
        if engine == "eager":
            found["interpreter"] = per_instruction(solo, 5 if options.smoke else 50)
        solo.close()
        print(f"{engine}: {found[engine]}", flush=True)
    print(f"interpreter: {found['interpreter']}")
    return found


def main() -> int:
    """Measures; returns the exit code."""
    parser = kit.parser(__doc__)
    parser.add_argument("--shape", help="which model; see release/gpu/models.py")
    options = parser.parse_args()
    name = options.shape or ("gpt-smoke" if options.smoke else "gpt2-350m-1024")
    found = figures_of((SHAPES | SMOKE)[name], options)
    medians = found["interpreter"]["medians"]
    slowest = max(medians[kind] for kind in ("FORWARD", "BACKWARD"))
    targets = [kit.Target("s per forward or backward", slowest, f"<= {PER_INSTRUCTION_S}")]
    if options.device == "cuda":
        gap = found["eager"]["gaps"]["median"]
        targets += [
            kit.Target("s of the median gap, eager", gap, f"<= {GAP_S}"),
            # One wait for the norm at the end of a step drains the device: a long gap is due there.
            kit.Target(
                "gaps over 50 us per step, eager", found["eager"]["long_gaps_per_step"], "<= 2"
            ),
        ]
    return kit.write(options, "overhead", {"shape": name, **found}, targets)


if __name__ == "__main__":
    sys.exit(main())
