"""raypar as one more system in the speed comparisons: a plan on Ray actors, k steps at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from release.pairs import Timing

if TYPE_CHECKING:
    from raypar.plan import Plan
    from raypar.stages.run import StepResult
    from release.peers import Workload

MOST_RANKS = 2


@contextmanager
def raypar_cluster() -> Iterator[None]:
    """A Ray for this benchmark alone, with room for all systems that wait for their turn.

    Its CPUs are logical ones: systems take turns, so that two of them never compute at once.
    """
    from raypar.train.session import start_private_ray

    with start_private_ray(num_cpus=8 * MOST_RANKS):
        yield


def uniform_plan(load: Workload, schedule: str, *, stages: int, replicas: int = 1) -> Plan:
    """The planner `uniform`'s split of a workload over one-thread CPU devices."""
    import raypar

    graph = raypar.capture(load.model, load.data())
    ranks = min(stages, MOST_RANKS) * replicas
    return raypar.plan(
        graph,
        raypar.Cluster.local(ranks),
        raypar.SearchConfig(
            planner="uniform",
            stages=stages,
            replicas=replicas,
            microbatches=load.microbatches,
            schedule=schedule,
        ),
    )


class RayparRun:
    """A plan's stage actors, started once and told to train a few steps at a time.

    Args:
        model_fn: Builds the model, seeded.
        batch: The global batch that every step trains on.
        plan: How to split it.
        name: What to call it in tables.
        optimizer: Builds the optimizer from one rank's parameters.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        batch: tuple[torch.Tensor, ...],
        plan: Plan,
        *,
        name: str,
        optimizer: Callable[[Any], torch.optim.Optimizer],
    ) -> None:
        from raypar.graph.capture import capture
        from raypar.stages.compile import compile_plan
        from raypar.stages.remote import RayRun
        from raypar.train.data import BatchForm
        from raypar.train.feed import DataFeed, RemadeBatches

        self.name = name
        specs = compile_plan(capture(model_fn, batch), plan, optimizer=optimizer, threads=1)
        feed = DataFeed(RemadeBatches(_Again(batch), seed=0), BatchForm(batch), specs)
        self._run = RayRun(specs, cluster=plan.cluster, feed=feed, name="bench")
        self._done = 0
        try:
            self._run.start()
        except BaseException:
            self._run.close()
            raise

    def steps(self, count: int) -> Timing:
        """Trains `count` steps; the time is the client's, dispatch and reports included."""
        results: list[StepResult] = []
        began = time.perf_counter()
        self._run.train(self._done, count, results.append)
        seconds = time.perf_counter() - began
        self._done += count
        losses = [r.loss for r in results if r.loss is not None]
        return Timing(seconds / count, losses)

    def close(self) -> None:
        """Ends the actors; safe to call twice."""
        self._run.close()


class _Again:
    """A data source that yields one batch for ever, and travels to the actors."""

    def __init__(self, batch: tuple[torch.Tensor, ...]) -> None:
        self._batch = batch

    def __call__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        while True:
            yield self._batch
