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
SYSTEMS, RANKS = 8, 2
"""At most so many raypar systems wait at a time, each on so many devices."""


@contextmanager
def raypar_cluster() -> Iterator[None]:
    """A Ray for this benchmark alone, with room for all systems that wait for their turn.

    Its CPUs are logical ones: systems take turns, so that two of them never compute at once.
    """
    from raypar.train.session import start_private_ray

    with start_private_ray(num_cpus=SYSTEMS * RANKS):
        yield


def uniform_plan(
    load: Workload, schedule: str, *, ranks: int = 1, chunks: int = 1, replicas: int = 1
) -> Plan:
    """The planner `uniform`'s split of a workload: `chunks` stages on each of `ranks` devices."""
    import raypar

    graph = raypar.capture(load.model, load.data())
    return raypar.plan(
        graph,
        raypar.Cluster.local(ranks * replicas),
        raypar.SearchConfig(
            planner="uniform",
            stages=ranks * chunks,
            chunks=chunks,
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
        from raypar.testing.backends import start_run

        self.name = name
        specs = compile_plan(capture(model_fn, batch), plan, optimizer=optimizer, threads=1)
        # Like the peers, every rank holds its rows of the one batch: no loader is measured.
        self._run = start_run("ray", specs, batch)
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
