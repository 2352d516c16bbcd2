"""One attempt of a run: from a plan to ranks that train, until the end or a failure."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar._plan_text import count_of
from raypar.errors import CheckpointError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.compiled import COMPILING_S
from raypar.stages.initial import InitialWeights
from raypar.stages.run import START_TIMEOUT_S, Run
from raypar.stages.spec import RankSpec
from raypar.train._evaluation_io import EvaluationData
from raypar.train.beside import Beside
from raypar.train.callbacks import Callbacks, RunFacts
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.checkpoint.reading import RenewJob
from raypar.train.data import BatchForm, DataPosition, Opened
from raypar.train.display import Display
from raypar.train.evaluate import Evaluator
from raypar.train.feed import DataFeed, HeldBatches
from raypar.train.loop import TrainLoop
from raypar.train.metrics import MetricsLog, tokens_of
from raypar.train.optimizer import check_optimizer_on
from raypar.train.settings import Settings
from raypar.train.signals import Signals
from raypar.train.state import TrainState
from raypar.train.utilisation import model_flops, peak_flops, product_dtype


class Clock:
    """Seconds of each part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def mark(self, name: str) -> float:
        """Books the time since the last mark, and returns it."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        return passed

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
        steps: Optimizer steps in all; None where only the end of the data tells.
        signals: Ctrl-C and SIGTERM.
        callbacks: Told of the run.
        clock: Times the start-up.
        store: The run's checkpoints, or None.
        resume: What the next attempt goes on from, or None.
        state: Where training stands.
        initial: What the model begins with in place of what the seed makes, or None.
        evaluation: What is evaluated on, looked at already, or None.
        notes: What users should know before the first step.
        display: What is told of the run before and between attempts.
    """

    folder: Path
    opened: Opened
    form: BatchForm
    graph: OpGraph
    steps: int | None
    signals: Signals
    callbacks: Callbacks
    clock: Clock
    store: CheckpointStore | None = None
    resume: Checkpoint | None = None
    state: TrainState = field(default_factory=TrainState)
    initial: InitialWeights | None = None
    evaluation: EvaluationData | None = None
    notes: tuple[str, ...] = ()
    display: Display = field(default_factory=lambda: Display(None, 0))


class Attempt:
    """Brings the ranks of a plan up and trains.

    Args:
        settings: What the trainer was asked for.
        prepared: What all attempts share; its `state` is kept up to date.
        plan: What to run.
        cluster: Where.
        on_up: Called once the ranks are up.

    Attributes:
        up: Whether the ranks came up and stand where training goes on.
    """

    def __init__(
        self,
        settings: Settings,
        prepared: Prepared,
        plan: Plan,
        cluster: Cluster,
        *,
        on_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._prepared = prepared
        self._plan = plan
        self._cluster = cluster
        self._on_up = on_up
        self.up = False

    def go(self) -> dict[str, Any]:
        """Trains to the end.

        Returns:
            The run's metrics.
        """
        made, clock = self._prepared, self._prepared.clock
        specs = self._compile()
        check_optimizer_on(specs)
        clock.mark("compile")
        with ExitStack() as stack:
            run = self._make_run(stack, specs)
            stack.callback(run.close)
            ranks = count_of(len(specs), "rank")
            where = "threads here" if self._settings.scaling.in_process else "Ray actors"
            longer = ", compiling, which can take minutes" * (self._settings.engine == "compiled")
            with made.display.doing(f"starting {ranks} as {where}{longer}"):
                parts = run.start()
            made.display.say(f"started {ranks} in {clock.mark('start'):.1f} s{_building(parts)}")
            for name, seconds in parts.items():
                clock.seconds[f"start.{name}"] = seconds
            if made.resume is not None:
                with made.display.doing(f"loading {made.resume.path}"):
                    made.state = made.resume.restore(run)
                    if self._settings.renew_options:
                        run.call("visit", RenewJob())
                loaded = f"loaded step {made.state.step} in {clock.mark('restore'):.1f} s"
                made.display.say(f"{loaded} from {made.resume.path}")
            first = made.state.step
            run.call("prefetch", first, first + 1 if made.steps is None else made.steps)
            self.up = True
            self._on_up()
            return self._train(stack, run, specs)

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
            initial=self._prepared.initial if self._prepared.resume is None else None,
            engine=settings.engine,
        )

    def _make_run(self, stack: ExitStack, specs: list[RankSpec]) -> Run:
        settings, made = self._settings, self._prepared
        start = DataPosition.from_json(made.state.data)
        epochs = settings.epochs
        if settings.scaling.in_process:
            from raypar.stages.local import LocalRun

            held = HeldBatches(made.opened)
            return LocalRun(
                specs,
                feed=DataFeed(held, made.form, specs, start=start, epochs=epochs),
            )
        from raypar.mesh.skew import check_skew
        from raypar.stages.remote import RayRun
        from raypar.train.relay import shipped

        check_skew(self._cluster)
        left = (sys.maxsize if made.steps is None else made.steps) - made.state.step
        source = shipped(
            settings.data, made.opened, settings.seed, left, stack, start=start, epochs=epochs
        )
        return RayRun(
            specs,
            plan=self._plan,
            cluster=self._cluster,
            feed=DataFeed(source, made.form, specs, start=start, epochs=epochs),
            name=f"raypar-{made.folder.name}",
            use_gpu=settings.scaling.use_gpu,
            cpus_per_rank=settings.scaling.cpus_per_worker,
            start_timeout_s=settings.scaling.start_timeout_s or START_TIMEOUT_S,
            build_timeout_s=self._build_timeout_s,
            placement_timeout_s=settings.scaling.placement_timeout_s,
            network=settings.network,
            lent=settings.lent,
        )

    @property
    def _build_timeout_s(self) -> float | None:
        given = self._settings.scaling.start_timeout_s
        return COMPILING_S if given is None and self._settings.engine == "compiled" else given

    def _train(self, stack: ExitStack, run: Run, specs: list[RankSpec]) -> dict[str, Any]:
        settings, made = self._settings, self._prepared
        log = self._log(run, specs)
        stack.callback(log.close)
        display = stack.enter_context(Display(made.steps, settings.run.log_every))
        for note in (*made.notes, *run.notes):
            display.say(note)
        made.callbacks.on_start(self._facts(run))
        beside = Beside(
            run=run,
            plan=self._plan,
            log=log,
            display=display,
            callbacks=made.callbacks,
            store=made.store,
            evaluator=self._evaluator(specs),
            evaluation=made.evaluation,
            settings=settings,
        )
        loop = TrainLoop(
            run,
            made.state,
            settings.limits(made.steps),
            beside,
            samples=made.form.spec.size,
            on_first=lambda: display.say(
                f"first step done in {made.clock.mark('first_step'):.1f} s"
            ),
        )
        try:
            with made.signals.softly(loop.interrupt):
                loop.go()
        except BaseException:
            self._finish_checkpoints()
            raise
        finally:
            made.state = loop.state
        return {
            **log.summary(),
            **{k: v for k, v in made.state.metrics.items() if k.startswith("eval_")},
            **({"stopped": loop.stopped} if loop.stopped else {}),
            "total_steps": made.state.step,
            **({"checkpoint_stall_s": beside.stall_s} if made.store is not None else {}),
            "driver_share": getattr(run, "driver_share", None),
        }

    def _finish_checkpoints(self) -> None:
        """What is being written when a run fails dies with the ranks: it is given time to end."""
        store = self._prepared.store
        if store is None:
            return
        with contextlib.suppress(CheckpointError):
            # A rank that is gone is noticed; one that writes is waited for.
            store.wait()

    def _log(self, run: Run, specs: list[RankSpec]) -> MetricsLog:
        made = self._prepared
        dtype = product_dtype(made.graph)
        return MetricsLog(
            made.folder / "metrics.jsonl",
            made.form.spec.size,
            tokens_of(made.form),
            run.infos,
            specs=specs,
            model_flops=model_flops(made.graph),
            peak_flops=peak_flops(self._plan, self._cluster, dtype),
            first_step=made.state.step,
        )

    def _facts(self, run: Run) -> RunFacts:
        made = self._prepared
        return RunFacts(
            name=made.folder.name,
            folder=made.folder,
            plan=self._plan,
            graph=made.graph,
            cluster=self._cluster,
            infos=run.infos,
            first_step=made.state.step,
            steps=made.steps,
            config=dict(self._settings.config),
            startup=made.clock.summary(),
        )

    def _evaluator(self, specs: list[RankSpec]) -> Evaluator | None:
        if self._prepared.evaluation is None:
            return None
        return Evaluator(
            self._prepared.graph, self._plan, specs, metrics=self._settings.eval_metrics
        )


def _building(parts: Mapping[str, float]) -> str:
    """What of the start went into building programs, where that is known by itself."""
    seconds = parts.get("ranks.programs")
    return "" if seconds is None else f", of which {seconds:.1f} s building the model's parts"
