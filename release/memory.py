"""Bytes held between forward and backward: predicted before anything runs, and measured.

    python release/memory.py [--models gpt,cnn,t5,unet] [--schedules 1f1b,gpipe,...]
                             [--stages 3] [--json FILE]

Predicted: what one microbatch of a stage keeps from forward to backward, and between the halves of
a split backward (`StageProgram.saved_bytes` and `half_bytes`, from the traced graph's fake
tensors), along the instruction lists; with one-piece backwards that is `saved_bytes` times the
lifetime walk's most microbatches in flight. Measured: after every instruction of a real step, the
distinct storages that the interpreter holds for backward, without parameters, unchanging buffers,
constants, batch-wide values and the batch. A line per model, schedule and recompute policy; exits
with 1 if a stage is off by more than 5 %, or the interpreter's own report is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.comm.group import Group
from raypar.lowered import lower_plan
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.schedules.check import check_lists
from raypar.schedules.instructions import Instruction
from raypar.schedules.registry import schedule_names
from raypar.schedules.saved import peak_saved_per_stage
from raypar.stages.compile import compile_plan
from raypar.stages.holdings import Workshop
from raypar.stages.interpreter import RankRunner
from raypar.stages.local import LocalRun
from raypar.stages.run import StepResult
from raypar.stages.spec import RankSpec
from raypar.testing import models
from raypar.testing.backends import RepeatFeed
from raypar.testing.equivalence import default_optimizer
from release._figures import write_figures

TOLERANCE = 0.05
MICROBATCHES = 8
GLOBAL_BATCH = 16


class Watched(RankRunner):
    """Looks at what is really held after every forward and backward."""

    def __init__(self, spec: RankSpec, world: Group, workshop: Workshop) -> None:
        self.held: dict[int, int] = {}
        super().__init__(spec, world, workshop=workshop)

    def _forward(self, now: Instruction) -> None:
        super()._forward(now)
        self._look()

    def _backward_input(self, now: Instruction) -> None:
        super()._backward_input(now)
        self._look()

    def _look(self) -> None:
        free = [
            *self._params.values(), *self._holdings.params.values(), *self._inputs.values(),
            *self._holdings.constants.values(), *self._globals.values(), *self._tangents.values(),
        ]  # fmt: skip
        changing = {name for s in self._holdings.stages.values() for name in s.spec.updates}
        free += [b for n, b in self._holdings.buffers.items() if n not in changing]
        outside = {key for key, _ in _storages(free)}
        by_stage: dict[int, dict[int, int]] = {}
        for boxes in (self._saved, self._halves):
            for (stage, _), box in boxes.items():
                found = by_stage.setdefault(stage, {})
                found.update((k, n) for k, n in _storages(box) if k not in outside)
        for stage, found in by_stage.items():
            self.held[stage] = max(self.held.get(stage, 0), sum(found.values()))


def _storages(values: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()


@dataclass
class Line:
    """One plan: bytes per stage."""

    model: str
    schedule: str
    recompute: str
    in_flight: list[int]
    predicted: list[int]
    reported: list[int]
    measured: list[int]

    @property
    def ratios(self) -> list[float]:
        return _ratios(self.predicted, self.measured)

    @property
    def off(self) -> float:
        both = [*self.ratios, *_ratios(self.reported, self.measured)]
        return max(abs(ratio - 1) for ratio in both)

    def text(self) -> str:
        def row(values: list[int]) -> str:
            return " ".join(f"{v:>8}" for v in values)

        ratios = " ".join(f"{r:.3f}" for r in self.ratios)
        return (
            f"{self.model:<6} {self.schedule:<16} {self.recompute:<9} in flight "
            f"{' '.join(map(str, self.in_flight)):<8} predicted {row(self.predicted)}  "
            f"measured {row(self.measured)}  ratio {ratios}"
        )


def _ratios(values: list[int], measured: list[int]) -> list[float]:
    return [v / m if m else float(v == 0) for v, m in zip(values, measured, strict=True)]


def check(name: str, schedule: str, recompute: str, stages: int) -> Line:
    """Predicts, then runs one step and looks."""
    case = models.case(name)
    batch = case.batch(0, GLOBAL_BATCH)
    graph = capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    chunks = 2 if schedule.startswith("interleaved") else 1
    search = SearchConfig(
        stages=stages * chunks, replicas=1, chunks=chunks, microbatches=MICROBATCHES,
        schedule=schedule, recompute=recompute,
    )  # fmt: skip
    plan: Plan = make_plan(graph, Cluster.local(stages), search)
    sliced = lower_plan(graph, plan)
    walk = check_lists(sliced.lists, sliced.io, plan.microbatches)
    specs = compile_plan(graph, plan, optimizer=default_optimizer)
    workshop, runners = Workshop(), []

    def runner(spec: RankSpec, world: Group) -> Watched:
        runners.append(Watched(spec, world, workshop))
        return runners[-1]

    feed = partial(RepeatFeed, tensors=models.tensors(batch))
    results: list[StepResult] = []
    with LocalRun(specs, feed=feed, runner=runner) as run:
        run.train(0, 1, results.append)
        programs = {i: s.program for r in runners for i, s in r._holdings.stages.items()}
        measured = {i: n for r in runners for i, n in r.held.items()}
    reported = {i: n for r in results[0].ranks for i, n in r.peak_saved.items()}
    count = range(len(plan.stages))
    saved = [programs[s].saved_bytes for s in count]
    predicted = peak_saved_per_stage(sliced.lists, saved, [programs[s].half_bytes for s in count])
    if not schedule.startswith("zero"):
        assert list(predicted) == [saved[s] * walk.peak_in_flight[s] for s in count]
    return Line(
        name, schedule, recompute, list(walk.peak_in_flight), list(predicted),
        [reported.get(s, 0) for s in count],
        [measured.get(s, 0) for s in count],
    )  # fmt: skip


def main() -> int:
    """Prints every line; 1 if one is off by more than 5 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="gpt,cnn,t5,unet")
    parser.add_argument("--schedules", default=",".join(schedule_names()))
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name in args.models.split(","):
        for schedule in args.schedules.split(","):
            for recompute in RECOMPUTE_POLICIES:
                lines.append(check(name, schedule, recompute, args.stages))
                print(lines[-1].text(), flush=True)
    worst = {s: max(n.off for n in lines if n.schedule == s) for s in args.schedules.split(",")}
    print("largest deviation: " + ", ".join(f"{s} {100 * w:.2f} %" for s, w in worst.items()))
    if args.json:
        body = {"deviation": worst, "lines": [asdict(n) | {"ratios": n.ratios} for n in lines]}
        write_figures(args.json, body)
    return int(max(worst.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
