"""The trainer: model, loss, optimizer and data in; trained model, metrics and plan out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

import torch

from raypar.comm.network import NetworkSettings
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.run.writer import PredictionWriter
from raypar.stages.recipe import LossScale, SchedulerFn
from raypar.stages.spec import Engine, OptimizerFn
from raypar.train._evaluation_io import EvaluationData
from raypar.train._run_lock import locked
from raypar.train.attempt import Clock, Prepared
from raypar.train.attempts import Attempts, Teller, check_restartable
from raypar.train.callbacks import Callbacks
from raypar.train.checkpoint import Checkpoint
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import BatchForm, Data, Opened, peek
from raypar.train.devices import Devices, plan_of
from raypar.train.display import Display
from raypar.train.loggers.events import EventLog
from raypar.train.loop import EarlyStop
from raypar.train.metrics_file import told
from raypar.train.optimizer import check_recipe, check_resumed
from raypar.train.planning import random_state_kept
from raypar.train.result import Result
from raypar.train.resuming import beginning, store_of
from raypar.train.resuming import checkpoint_at as checkpoint_at
from raypar.train.settings import Settings
from raypar.train.signals import terminating
from raypar.train.travelling import check_sendable
from raypar.train.weights import initial_weights


class Trainer:
    """Trains one model over the devices of a cluster, exactly as one process would.

    Args:
        model_fn: Builds the module.
        loss_fn: Maps the module's output (and batch) to the loss; None where the output is the
            loss or has it as ``.loss``. See `raypar.capture`.
        optimizer: Builds the optimizer from parameters, for example
            ``lambda params: torch.optim.AdamW(params, lr=3e-4)``; called on every rank.
        data: Global batches, of tensors or NumPy arrays: what `raypar.batches` makes of a data set,
            an iterable, a DataLoader, an iterator, or a callable that returns one. What can be
            iterated again is repeated.
        plan: ``"auto"`` searches one; or a Plan, or the path of a plan file.
        steps: Optimizer steps in all, those before a resume among them.
        epochs: Times through the data, in place of `steps`.
        time_limit_s: Training seconds after which the run ends early, over all attempts.
        seed: Seed of initialisation, of dropout, and of the loader's random order.
        clip_norm: Limit of the global gradient norm, or None.
        scheduler: Builds a learning-rate scheduler from the optimizer; stepped once a step.
        precision: ``"bf16"`` or ``"fp16"``: model and loss run under autocast; parameters,
            gradients and the optimizer stay as the model has them.
        loss_scale: How the loss is scaled under fp16; default: as `torch.amp.GradScaler` does.
        accumulate: Batches of the data in a row that make one global batch.
        ema_decay: Decay of a moving average of the weights, kept beside them.
        engine: How the programs of stages run: ``"eager"``, as they are; ``"compiled"``, through
            `torch.compile`, which takes up to minutes in the first step and rounds differently; or
            ``"cuda_graph"``, replayed from CUDA graphs, on GPUs alone. A search times its plans
            as ``"eager"``.
        eval_data: Batches to evaluate on, in eval mode, without gradients; an iterable that can be
            gone through again, or a callable that returns one.
        eval_every: Steps between evaluations; None: one at the end.
        eval_metrics: Name → function of the module's output and the batch; see
            `raypar.train.evaluate.Evaluator`.
        eval_weights: ``"live"`` or ``"ema"``: which weights are evaluated.
        early_stop: Ends the run when evaluations no longer get better.
        resume_from: A checkpoint, its path, the folder of a run, or ``"auto"``: the newest
            checkpoint of this very run, where there is one.
        init_from: Weights that the model begins with in place of what the seed makes: a Hugging
            Face folder, a safetensors file, a checkpoint or the folder of a run; each rank reads
            its own parts. A run that is resumed goes on from its checkpoint instead.
        scaling_config: How much of the cluster to use.
        run_config: Where the files go, checkpoints, what happens after failures.
        search_config: How a plan is searched (`raypar.SearchConfig`), for ``plan="auto"``.
        batch_dims: Batch dim of every tensor of a batch, as for `raypar.capture`.
        network: Interface and ports of the ranks, and NCCL's environment.
        on_plan: Called with plan, graph and cluster once they are known, before anything starts.
        config: The configuration that all of this comes from, kept with checkpoints.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        model_fn: Callable[[], torch.nn.Module],
        *,
        optimizer: OptimizerFn,
        data: Data,
        steps: int | None = None,
        epochs: int | None = None,
        time_limit_s: float | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        plan: Plan | str | Path | Literal["auto"] = "auto",
        seed: int = 0,
        clip_norm: float | None = None,
        scheduler: SchedulerFn | None = None,
        precision: Literal["bf16", "fp16"] | None = None,
        loss_scale: LossScale | None = None,
        accumulate: int = 1,
        ema_decay: float | None = None,
        engine: Engine = "eager",
        eval_data: Data | None = None,
        eval_every: int | None = None,
        eval_metrics: Mapping[str, Any] | None = None,
        eval_weights: Literal["live", "ema"] = "live",
        early_stop: EarlyStop | None = None,
        resume_from: Checkpoint | str | Path | None = None,
        init_from: Checkpoint | str | Path | None = None,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        search_config: Any = None,
        batch_dims: Any = None,
        network: NetworkSettings | None = None,
        on_plan: Callable[[Plan, OpGraph, Cluster], None] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings = Settings(
            model_fn=model_fn,
            optimizer=optimizer,
            data=data,
            steps=steps,
            epochs=epochs,
            time_limit_s=time_limit_s,
            loss_fn=loss_fn,
            plan=plan,
            seed=seed,
            clip_norm=clip_norm,
            scheduler=scheduler,
            precision=precision,
            loss_scale=loss_scale,
            accumulate=accumulate,
            ema_decay=ema_decay,
            engine=engine,
            eval_data=eval_data,
            eval_every=eval_every,
            eval_metrics=eval_metrics or {},
            eval_weights=eval_weights,
            early_stop=early_stop,
            resume_from=resume_from,
            init_from=init_from,
            scaling=scaling_config or ScalingConfig(),
            run=run_config or RunConfig(),
            search=search_config,
            batch_dims=batch_dims,
            network=network,
            on_plan=on_plan,
            config=config or {},
        )

    @property
    def settings(self) -> Settings:
        """What it was given, checked."""
        return self._settings

    def changed(self, **settings: Any) -> Self:
        """A trainer like this one, with other values for some fields of its `settings`.

        Args:
            **settings: Fields of `raypar.train.settings.Settings`: as this class's arguments, but
                for ``scaling``, ``run`` and ``search``.

        Raises:
            ConfigError: A value is out of range.
        """
        other = copy.copy(self)
        other._settings = dataclasses.replace(self._settings, **settings)
        return other

    def fit(self) -> Result:
        """Trains, and writes the run's folder.

        The folder ``<storage_path>/<name>/`` holds ``plan.json``, ``metrics.jsonl`` (one line per
        step), ``events.jsonl``, ``timeline.json`` (who did what when, in the last steps),
        ``result.json`` and ``checkpoints/``; where a plan was searched also ``search.json``, what
        the search looked at. A search on Ray runs some steps of plans that could be the best
        (`SearchConfig.measure`), on the first batch and with the model as it is initialised;
        training then starts afresh.

        Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint.

        Returns:
            Metrics, folder, plan, and the newest checkpoint.

        Raises:
            ConfigError: The folder cannot be written, or another run trains in it.
            DataError: The data raised, ended early, or changed form.
            CaptureError: The model cannot be captured.
            CheckpointError: What to resume or to begin from is missing, damaged, or of another
                model.
            PlanError: The plan does not fit the model, the cluster or `scaling_config`.
            ClusterError: The cluster is not reachable, or lacks the devices.
            OptimizerError: The optimizer cannot be used, or raised; or what is resumed was trained
                with another optimizer, scheduler, or other options that decide its numbers.
            NonFiniteError: A loss or gradient became NaN or infinite.
            StageDiedError: A stage actor or its node was lost, more often than
                `FailureConfig.max_failures` allows.
            TrainingError: A rank failed in another way.
        """
        path = self._settings.run.folder()
        with locked(path):
            (path / "result.json").unlink(missing_ok=True)
            try:
                return self._fit(path)
            except BaseException as error:
                text = f"{type(error).__name__}: {error}".strip()
                with contextlib.suppress(OSError):
                    _write_json(path / "result.json", {"error": text})
                raise

    def _fit(self, path: Path) -> Result:
        settings, clock = self._settings, Clock()
        plan = _load(settings.plan)
        resume, begin = beginning(settings, path)
        opened = peek(
            settings.data,
            settings.seed,
            accumulate=settings.accumulate,
            batch_dims=settings.batch_dims,
        )
        form = BatchForm(opened.example, settings.batch_dims)
        with ExitStack() as stack:
            evaluation = None
            if settings.eval_data is not None:
                evaluation = EvaluationData(settings.eval_data, settings.seed)
                stack.callback(evaluation.close)
                evaluation.look()
            clock.mark("data")
            signals = stack.enter_context(terminating())
            if settings.scaling.in_process:
                stack.enter_context(random_state_kept())
            # What is wrong with model or optimizer is told before any Ray is started.
            graph = capture(*_captured(settings, opened.example), settings.batch_dims)
            check_recipe(settings.optimizer, settings.recipe, graph.params)
            if not settings.scaling.in_process:
                check_sendable(settings)
            initial, notes = (None, ()) if begin is None else initial_weights(begin, graph.model)
            clock.mark("capture")
            steps = _steps(settings, opened)
            made = Prepared(
                folder=path,
                opened=opened,
                form=form,
                graph=graph,
                steps=steps,
                display=Display(steps, settings.run.log_every),
                signals=signals,
                callbacks=Callbacks([EventLog(), PredictionWriter(), *settings.run.callbacks]),
                clock=clock,
                store=store_of(settings, path, stack),
                initial=initial,
                evaluation=evaluation,
                notes=notes,
            )
            if resume is not None:
                check_resumed(settings.optimizer, settings.recipe, graph.params, resume)
                made.resume, made.state = resume, resume.state
                plan = plan or plan_of(resume, settings)
            check_restartable(settings, made)
            tell = Teller(made)
            devices = Devices(settings, tell)
            devices.connect(plan, signals, stack)
            clock.mark("ray")
            try:
                summary, plan = Attempts(settings, made, devices, tell).go(plan)
            except BaseException as error:
                try:
                    made.callbacks.on_end({"error": f"{type(error).__name__}: {error}"})
                except Exception as second:  # what ended the run is what the user has to see
                    error.add_note(f"Callback.on_end raised {type(second).__name__}: {second}")
                raise
        if not summary["steps"]:  # a resume of what was done already: its last step's figures
            kept = {k: v for k, v in made.state.metrics.items() if k in ("loss", "grad_norm")}
            summary = {**kept, **summary}
        summary["startup"] = clock.summary()
        with told(path):
            _write_json(path / "result.json", summary)
        made.callbacks.on_end(summary)
        newest = (made.store.latest() if made.store is not None else None) or made.resume
        return Result(summary, path, plan, checkpoint=newest)


def _captured(settings: Settings, example: Any) -> tuple[Any, Any, Any]:
    model, loss = settings.model_and_loss
    return model, example, loss


def _steps(settings: Settings, opened: Opened) -> int | None:
    """Optimizer steps in all, or None where only the end of the data tells."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return opened.steps_in(settings.epochs)


def _load(plan: Plan | str | Path) -> Plan | None:
    if isinstance(plan, Plan):
        return plan
    return None if plan == "auto" else Plan.load(plan)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
