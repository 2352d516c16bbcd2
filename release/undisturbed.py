"""A plan on stage actors, told to train a few steps at a time on a machine in use.

How steps that other programs disturbed are told from quiet ones: `raypar.train.quiet`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.remote import RayRun
from raypar.stages.run import StepResult
from raypar.testing.backends import RepeatFeed
from raypar.train.quiet import (
    ENOUGH,
    QUIET,
    CountedRank,
    Figure,
    Step,
    figure_of,
    load,
    machine_busy_s,
)

__all__ = ["CountedRun", "Figure", "Step", "figure_of", "load"]

_CORES = os.cpu_count() or 1


class CountedRun:
    """A plan on stage actors of Ray, one thread each, told to train a few steps at a time.

    Args:
        graph: The captured model.
        batch: The batch that every step trains on.
        plan: How to split it.
        optimizer: Builds the optimizer from one rank's parameters.
        name: What to call it in tables.
    """

    def __init__(
        self,
        graph: OpGraph,
        batch: Sequence[torch.Tensor],
        plan: Plan,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        name: str = "",
    ) -> None:
        self.name = name
        specs = compile_plan(graph, plan, optimizer=optimizer, threads=1)
        feed = functools.partial(RepeatFeed, tensors=list(batch))
        self._run = RayRun(specs, feed=feed, runner=CountedRank)
        self._done = 0
        try:
            self._run.start()
        except BaseException:
            self._run.close()
            raise

    def steps(self, count: int) -> list[Step]:
        """Trains `count` steps."""
        results: list[StepResult] = []
        began, busy = time.perf_counter(), machine_busy_s()
        self._run.train(self._done, count, results.append)
        self._done += count
        own = sum(rank.seconds["cpu"] for result in results for rank in result.ranks)
        others = machine_busy_s() - busy - own
        disturbed = max(0.0, others) / (_CORES * (time.perf_counter() - began))
        return [Step(result.seconds, disturbed, result.ranks) for result in results]

    def until_quiet(self, warm_up: int, least: int, most_s: float) -> list[Step]:
        """Trains until `ENOUGH` steps were quiet, at least `least`, or time is out.

        Args:
            warm_up: Steps that do not count.
            least: Steps that count.
            most_s: Seconds after which it ends in any case.
        """
        self.steps(warm_up)
        end = time.monotonic() + most_s
        found = self.steps(least)
        while time.monotonic() < end and sum(s.disturbed < QUIET for s in found) < ENOUGH:
            found += self.steps(least)
        return found

    def close(self) -> None:
        """Ends the actors; safe to call twice."""
        self._run.close()
