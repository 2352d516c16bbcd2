"""Predicted stage times against stage times of raypar itself.

    python release/cost.py [--models gpt,cnn,t5,mlp] [--stages 2] [--microbatches 6] [--rounds 3]
                           [--calibration FILE] [--json FILE]

Measured: what the interpreter takes for the forward and the backward of every stage, all ranks in
one process and one at work at a time (one thread each): CPU time of the rank's thread, which other
programs on the machine disturb little; the lower quartile over steps. Predicted:
by the analytic cost model, calibrated by `raypar probe` on ops alone (one device, as here), and by
the profiled one. Measurements, predictions and calibrations take turns for `--rounds` rounds, so
that other programs disturb all alike; the median of the rounds is printed. Exits with 1 where the
mean error of the analytic model is over 15 % or that of the profiled one over 10 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.comm.group import Group
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import read_calibration
from raypar.mesh.probe import probe
from raypar.plan import Plan
from raypar.schedules.instructions import Instruction
from raypar.search.cost.analytic import AnalyticCost, cached_pieces
from raypar.search.cost.base import StageCost, stage_code
from raypar.search.cost.machine import machine_of
from raypar.search.cost.params import accumulation_s, param_cost
from raypar.search.cost.profiled import profile
from raypar.search.cost.quick import quick_costs
from raypar.stages.compile import compile_plan
from raypar.stages.holdings import Workshop
from raypar.stages.interpreter import RankRunner
from raypar.stages.local import LocalRun
from raypar.stages.spec import RankSpec
from raypar.testing.backends import RepeatFeed
from raypar.testing.equivalence import default_optimizer
from release._figures import write_figures
from release.cost_models import CNN, GPT, MLP, T5

STEPS = 4
Batch = tuple[torch.Tensor, torch.Tensor]


def _words(samples: int, length: int, vocab: int) -> Batch:
    shape = (samples, length)
    return torch.randint(0, vocab, shape), torch.randint(0, vocab, shape)


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], Batch]]] = {
    "gpt": (lambda: GPT(4, 192, 6, 1000, 96), lambda m: _words(4 * m, 96, 1000)),
    "t5": (lambda: T5(2, 160, 5, 800, 80), lambda m: _words(4 * m, 80, 800)),
    "cnn": (
        lambda: CNN(24, 2),
        lambda m: (torch.randn(8 * m, 3, 32, 32), torch.randint(0, 10, (8 * m,))),
    ),
    "mlp": (
        lambda: MLP(640, 6),
        lambda m: (torch.randn(96 * m, 640), torch.randint(0, 100, (96 * m,))),
    ),
}


class Timed(RankRunner):
    """Notes how long every forward and backward takes."""

    def __init__(self, spec: RankSpec, world: Group, workshop: Workshop) -> None:
        self.forwards: dict[int, list[float]] = {}
        self.backwards: dict[int, list[float]] = {}
        super().__init__(spec, world, workshop=workshop)

    def _forward(self, now: Instruction) -> None:
        self._note(self.forwards, super()._forward, now)

    def _backward(self, now: Instruction) -> None:
        self._note(self.backwards, super()._backward, now)

    def _note(
        self, found: dict[int, list[float]], do: Callable[[Instruction], None], now: Instruction
    ) -> None:
        began = time.thread_time()
        do(now)
        assert now.stage is not None
        found.setdefault(now.stage, []).append(time.thread_time() - began)


@dataclass
class Line:
    """Seconds of one direction of one stage."""

    model: str
    stage: int
    direction: str
    measured: float
    analytic: float
    quick: float
    profiled: float

    def off(self, model: str) -> float:
        """Relative error of one cost model."""
        return float(getattr(self, model)) / self.measured - 1.0

    def text(self) -> str:
        """One line of the table."""
        columns = " ".join(
            f"{m} {1e3 * getattr(self, m):7.2f} ({100 * self.off(m):+5.1f} %)"
            for m in ("analytic", "quick", "profiled")
        )
        return (
            f"{self.model:<4} stage {self.stage} {self.direction:<8} measured "
            f"{1e3 * self.measured:7.2f} ms  {columns}"
        )


def quartile(found: list[float]) -> float:
    """The lower quartile: what other programs disturb least."""
    return sorted(found)[len(found) // 4]


def planned(name: str, stages: int, microbatches: int) -> tuple[OpGraph, Plan, Batch]:
    """A model, captured and cut into equal stages."""
    torch.manual_seed(0)
    build, make_batch = CASES[name]
    batch = make_batch(microbatches)
    graph = capture(build, batch)
    search = SearchConfig(
        planner="uniform", stages=stages, replicas=1, microbatches=microbatches,
        schedule="gpipe", recompute="none", tensor=1, zero=0,
    )  # fmt: skip
    return graph, make_plan(graph, Cluster.local(stages), search), batch


def measure(graph: OpGraph, plan: Plan, batch: Batch) -> list[tuple[float, float]]:
    """(forward, backward) seconds of every stage of real steps."""
    specs = compile_plan(graph, plan, optimizer=default_optimizer)
    workshop, runners = Workshop(), []

    def runner(spec: RankSpec, world: Group) -> Timed:
        runners.append(Timed(spec, world, workshop))
        return runners[-1]

    with LocalRun(specs, feed=partial(RepeatFeed, tensors=list(batch)), runner=runner) as run:
        run.train(0, STEPS, lambda result: None)
    found = {}
    for one in runners:
        for stage, forwards in one.forwards.items():
            backwards = one.backwards[stage]
            found[stage] = (quartile(forwards[1:]), quartile(backwards[1:]))
    return [found[s] for s in range(len(plan.stages))]


def priced(
    graph: OpGraph, plan: Plan, calibration: Calibration
) -> list[tuple[StageCost, tuple[float, float], tuple[float, float]]]:
    """Per stage the analytic cost, and quick and profiled seconds of both directions."""
    lowered = lower_plan(graph, plan)
    result = []
    for i, stage in enumerate(plan.stages):
        machine = machine_of(Cluster.local(len(plan.stages)), stage.mesh, calibration)
        code = stage_code(lowered, plan, i)
        calls = [n for n in code.graph.nodes if n.op == "call_function"]
        quick = quick_costs(calls, machine).seconds.sum(axis=0)
        adding = accumulation_s(param_cost(code), machine, cached_pieces(code).products)
        run = profile(code)
        result.append(
            (
                AnalyticCost().stage_cost(code, machine),
                (float(quick[0]), float(quick[1] + quick[2]) + adding),
                (run.forward, run.backward),
            )
        )
    return result


def lines_of(name: str, stages: int, args: argparse.Namespace) -> list[Line]:
    """All lines of one model: medians over rounds."""
    graph, plan, batch = planned(name, stages, args.microbatches)
    rounds: list[list[Line]] = []
    for _ in range(args.rounds):
        calibration = (
            read_calibration(args.calibration) if args.calibration else probe(Cluster.local(1))
        )
        measured = measure(graph, plan, batch)
        lines = []
        for s, (cost, quick, run) in enumerate(priced(graph, plan, calibration)):
            analytic = (cost.forward_s, cost.backward_s)
            for d, direction in enumerate(("forward", "backward")):
                lines.append(
                    Line(name, s, direction, measured[s][d], analytic[d], quick[d], run[d])
                )
        rounds.append(lines)
    return [_median([r[i] for r in rounds]) for i in range(len(rounds[0]))]


def _median(lines: list[Line]) -> Line:
    def middle(field: str) -> float:
        return statistics.median(getattr(line, field) for line in lines)

    first = lines[0]
    return Line(
        first.model, first.stage, first.direction,
        middle("measured"), middle("analytic"), middle("quick"), middle("profiled"),
    )  # fmt: skip


def main() -> int:
    """Prints every line and the mean errors; 1 if they are too large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores", flush=True)
    lines: list[Line] = []
    for name in args.models.split(","):
        lines += lines_of(name, args.stages, args)
        for line in lines[-2 * args.stages :]:
            print(line.text(), flush=True)
    errors = {
        model: statistics.mean(abs(line.off(model)) for line in lines)
        for model in ("analytic", "quick", "profiled")
    }
    print(
        "mean absolute error: "
        + ", ".join(f"{m} {100 * e:.1f} %" for m, e in errors.items())
        + f"; load average {os.getloadavg()[0]:.2f}"
    )
    if args.json:
        write_figures(args.json, {"errors": errors, "lines": [asdict(line) for line in lines]})
    return int(errors["analytic"] > 0.15 or errors["profiled"] > 0.10)


if __name__ == "__main__":
    sys.exit(main())
