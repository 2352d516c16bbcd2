"""One attempt of a run: from a plan to ranks that train, until the end or a failure."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.run import Run, StepResult
from raypar.stages.spec import RankSpec
from raypar.train.callbacks import Callbacks, RunFacts
from raypar.train.data import BatchForm, Opened
from raypar.train.feed import DataFeed, HeldBatches
from raypar.train.loop import TrainLoop
from raypar.train.metrics import Display, MetricsLog, tokens_of
from raypar.train.optimizer import check_optimizer_on
from raypar.train.settings import Settings
from raypar.train.signals import Signals
from raypar.train.state import TrainState


class Clock:
    """Seconds of each part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """Books the time since the last mark."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def summary(self) -> dict[str, float]:
        """Every part, and ``total``."""
        found = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        return {**found, "total": round(self._last - self._began, 3)}


@dataclass
class Prepared:
    """What all attempts of a run share.

    Attributes:
        folder: The run's folder.
        opened: The data, opened once.
        form: What a batch looks like.
        graph: The captured model.
        steps: Number of the last step, plus 1.
        signals: Ctrl-C and SIGTERM.
        callbacks: Told of the run.
        clock: Times the start-up.
        state: Where training stands.
    """

    folder: Path
    opened: Opened
    form: BatchForm
    graph: OpGraph
    steps: int
    signals: Signals
    callbacks: Callbacks
    clock: Clock
    state: TrainState = field(default_factory=TrainState)


class Attempt:
    """Brings the ranks of a plan up and trains.

    Args:
        settings: What the trainer was asked for.
        prepared: What all attempts share; its `state` is kept up to date.
        plan: What to run.
        cluster: Where.
    """

    def __init__(
        self, settings: Settings, prepared: Prepared, plan: Plan, cluster: Cluster
    ) -> None:
        self._settings = settings
        self._prepared = prepared
        self._plan = plan
        self._cluster = cluster

    def go(self) -> dict[str, Any]:
        """Trains to the end.

        Returns:
            The run's metrics.
        """
        clock = self._prepared.clock
        specs = self._compile()
        check_optimizer_on(specs)
        clock.mark("compile")
        with ExitStack() as stack:
            run = self._make_run(stack, specs)
            stack.callback(run.close)
            parts = run.start()
            clock.mark("start")
            for name, seconds in parts.items():
                clock.seconds[f"start.{name}"] = seconds
            summary = self._train(stack, run)
            torch.save(run.state_dict(), self._prepared.folder / "model.pt")
            return summary

    def _compile(self) -> list[RankSpec]:
        settings = self._settings
        return compile_plan(
            self._prepared.graph,
            self._plan,
            optimizer=settings.optimizer,
            seed=settings.seed,
            recipe=settings.recipe,
            threads=settings.scaling.threads(self._plan),
            accelerator=settings.scaling.use_gpu,
        )

    def _make_run(self, stack: ExitStack, specs: list[RankSpec]) -> Run:
        settings, made = self._settings, self._prepared
        if settings.scaling.in_process:
            from raypar.stages.local import LocalRun

            return LocalRun(specs, feed=DataFeed(HeldBatches(made.opened), made.form, specs))
        from raypar.stages.remote import RayRun
        from raypar.train.relay import shipped

        source = shipped(settings.data, made.opened, settings.seed, made.steps, stack)
        return RayRun(
            specs,
            plan=self._plan,
            cluster=self._cluster,
            feed=DataFeed(source, made.form, specs),
            name=f"raypar-{made.folder.name}",
            use_gpu=settings.scaling.use_gpu,
            cpus_per_rank=settings.scaling.cpus_per_worker,
            placement_timeout_s=settings.scaling.placement_timeout_s,
        )

    def _train(self, stack: ExitStack, run: Run) -> dict[str, Any]:
        settings, made = self._settings, self._prepared
        log = MetricsLog(
            made.folder / "metrics.jsonl", made.form.spec.size, tokens_of(made.form), run.infos
        )
        stack.callback(log.close)
        display = stack.enter_context(Display(made.steps, settings.run.log_every))
        for note in run.notes:
            display.say(note)
        made.callbacks.on_start(
            RunFacts(
                made.folder.name, made.folder, self._plan, made.graph, self._cluster, run.infos,
                made.state.step, made.steps, dict(settings.config),
            )
        )  # fmt: skip
        loop = TrainLoop(
            run,
            made.state,
            settings.limits(made.steps),
            _Beside(log, display, made.callbacks),
            samples=made.form.spec.size,
            on_first=lambda: made.clock.mark("first_step"),
        )
        with made.signals.softly(loop.interrupt):
            made.state = loop.go()
        return {
            **log.summary(),
            **({"stopped": loop.stopped} if loop.stopped else {}),
            "driver_share": getattr(run, "driver_share", None),
        }


class _Beside:
    """What is done beside steps (`raypar.train.loop.Hooks`)."""

    def __init__(self, log: MetricsLog, display: Display, callbacks: Callbacks) -> None:
        self._log = log
        self._display = display
        self._callbacks = callbacks

    def reported(self, result: StepResult) -> None:
        line = self._log.add(result)
        self._display.show(line)
        self._callbacks.on_step(line)

    def evaluate(self, step: int) -> dict[str, Any]:
        return {}

    def checkpoint(self, state: TrainState) -> None:
        pass

    def position(self, step: int) -> dict[str, Any]:
        return {}
