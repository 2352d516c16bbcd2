"""Measures stages for `release/learned.py`: real programs of real plans, alone on one thread."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.errors import RayparError
from raypar.lowered import lower_plan
from raypar.mesh.calibration import Calibration
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import StageCode, StageCost, stage_code
from raypar.search.cost.features import StageWork, stage_work
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.profiled import Seconds, profile
from raypar.search.cost.work import Work
from release.learned_models import Configuration, configurations

LEAST_S, MOST_S = 3e-3, 0.15
"""Stages that take less or more than this (forward and backward, by the analytic model) are left
out: a plan has none of the small ones, and the large ones take long to measure."""
DISTURBED = 0.04
"""Two measurements that differ by more than this, relatively, are followed by a third."""


@dataclass(frozen=True)
class Sample:
    """One measured stage.

    Attributes:
        family: Family of its model.
        words: The model, in words, and which stage it is.
        work: What the stage does.
        analytic: Seconds of the calibrated analytic model: forward, backward, its two halves.
        measured: The same, measured.
        spread: How much measurements of it differed, relative.
    """

    family: str
    words: str
    work: StageWork
    analytic: tuple[float, ...]
    measured: tuple[float, ...]
    spread: float


def stages_of(
    configuration: Configuration, calibration: Calibration
) -> Iterator[tuple[int, StageCode, MeshMachine, StageCost]]:
    """The stages of a configuration, and what the analytic model says of them."""
    torch.manual_seed(0)
    c = configuration
    graph = capture(c.build, c.batch(2 * c.samples))
    cluster = Cluster.local(c.stages * c.tensor)
    search = SearchConfig(
        planner="uniform", stages=c.stages, replicas=1, microbatches=2, schedule="gpipe",
        recompute=c.recompute, tensor=c.tensor, zero=0,
    )  # fmt: skip
    plan = make_plan(graph, cluster, search)
    lowered = lower_plan(graph, plan)
    for i, stage in enumerate(plan.stages):
        machine = machine_of(cluster, stage.mesh, calibration)
        code = stage_code(lowered, plan, i)
        yield i, code, machine, AnalyticCost().stage_cost(code, machine)


class Quiet:
    """Waits for moments in which other programs disturb little.

    A small reference (products in cache, sums out of it) is timed: where it takes longer than its
    best, so does what is measured now.
    """

    TOLERATED, PAUSE_S, TRIES = 1.06, 0.2, 3

    def __init__(self) -> None:
        self._square = torch.randn(256, 256)
        self._long = torch.randn(3 << 20)
        self._best = min(self._reference() for _ in range(10))

    def _reference(self) -> float:
        found = []
        for _ in range(5):
            began = time.thread_time()
            for _ in range(4):
                torch.mm(self._square, self._square)
            self._long.add_(1.0)
            found.append(time.thread_time() - began)
        return min(found)

    def wait(self) -> float:
        """Waits a little for such a moment; returns how disturbed it is, 1 for not at all."""
        least = float("inf")
        for _ in range(self.TRIES):
            now = self._reference()
            self._best = min(self._best, now)
            least = min(least, now / self._best)
            if now <= self.TOLERATED * self._best:
                break
            time.sleep(self.PAUSE_S)
        return least


def seconds_of(code: StageCode, quiet: Quiet) -> tuple[Seconds, float]:
    """Measured seconds of a stage's programs, and by how much measurements of them differ."""
    found = []
    for _ in range(2):
        quiet.wait()
        found.append(profile(code))
    whole = [run.forward + run.backward for run in found]
    spread = max(whole) / min(whole) - 1.0
    if spread > DISTURBED:
        quiet.wait()
        found.append(profile(code))
        # Other programs only add: the middle of the two better ones.
        found = sorted(found, key=lambda run: run.forward + run.backward)[:2]
    return Seconds(*(min(pair) for pair in zip(*found, strict=True))), spread


def measured_stages(
    family: str, calibration: Calibration, seed: int, quiet: Quiet
) -> Iterator[Sample]:
    """Different stages of one family, without end."""
    known: set[str] = set()
    for c in configurations(family, seed):
        try:
            for i, code, _, cost in stages_of(c, calibration):
                work = stage_work(code)
                if work.digest in known or not LEAST_S < cost.forward_s + cost.backward_s < MOST_S:
                    continue
                known.add(work.digest)
                measured, spread = seconds_of(code, quiet)
                analytic = (
                    cost.forward_s, cost.backward_s, cost.backward_input_s, cost.backward_weight_s,
                )  # fmt: skip
                words = f"{c.words}, stage {i} of {c.stages}, {c.tensor} wide, {c.recompute}"
                yield Sample(family, words, work, analytic, tuple(measured), round(spread, 4))
        except RayparError as error:
            print(f"{family} {c.words}: left out: {error}", flush=True)


def measure(
    families: Sequence[str], count: int, calibration: Calibration, seed: int, budget_s: float
) -> Iterator[Sample]:
    """Up to `count` stages of each family, in turns, for about `budget_s` seconds.

    In turns, so that a machine that is slower for a while is so for all families.
    """
    quiet = Quiet()
    sources = [measured_stages(family, calibration, seed, quiet) for family in families]
    began = time.perf_counter()
    for _ in range(count):
        for source in sources:
            if time.perf_counter() - began > budget_s:
                return
            yield next(source)


def save_samples(samples: list[Sample], path: Path) -> None:
    """One line for each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(s)) + "\n" for s in samples))


def load_samples(path: Path) -> list[Sample]:
    """What `save_samples` wrote."""
    found = []
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        own = raw["work"]
        work = StageWork(
            tuple((Work(*one), tuple(counts)) for one, counts in own["works"]),
            own["optimized_bytes"],
            own["optimized"],
            own["recompute"],
            tuple((name, size) for name, size in own["axes"]),
        )
        found.append(
            Sample(
                raw["family"], raw["words"], work, tuple(raw["analytic"]),
                tuple(raw["measured"]), raw["spread"],
            )
        )  # fmt: skip
    return found
