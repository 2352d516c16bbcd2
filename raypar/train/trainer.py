"""The trainer: model, loss, optimizer and data in; trained model, metrics and plan out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from raypar.comm.network import NetworkSettings
from raypar.errors import CheckpointError, ClusterError, CommError, PlanError, StageDiedError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import Plan
from raypar.report.run.writer import PredictionWriter
from raypar.stages.recipe import LossScale, SchedulerFn
from raypar.stages.spec import OptimizerFn
from raypar.train.attempt import Attempt, Clock, Prepared
from raypar.train.callbacks import Callbacks
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import BatchForm, Data, Opened, RandomState, peek
from raypar.train.loggers.events import EventLog
from raypar.train.loop import EarlyStop
from raypar.train.optimizer import check_recipe
from raypar.train.result import Result
from raypar.train.settings import Settings
from raypar.train.signals import terminating
from raypar.train.state import TrainState

if TYPE_CHECKING:
    from raypar.train.measure import RayMeasurer


CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints in the run's own."""


class Trainer:
    """Trains one model over the devices of a cluster, exactly as one process would.

    Args:
        model_fn: Builds the module.
        loss_fn: Maps the module's output (and batch) to the loss; None where the output is the
            loss or has it as ``.loss``. See `raypar.capture`.
        optimizer: Builds the optimizer from parameters, for example
            ``lambda params: torch.optim.AdamW(params, lr=3e-4)``; called on every rank.
        data: Global batches: what `raypar.batches` makes of a data set, an iterable, a DataLoader,
            an iterator, or a callable that returns one. What can be iterated again is repeated.
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
        eval_data: Batches to evaluate on, in eval mode, without gradients; an iterable that can be
            gone through again, or a callable that returns one.
        eval_every: Steps between evaluations; None: one at the end.
        eval_metrics: Name → function of the module's output and the batch; see
            `raypar.train.evaluate.Evaluator`.
        eval_weights: ``"live"`` or ``"ema"``: which weights are evaluated.
        early_stop: Ends the run when evaluations no longer get better.
        resume_from: A checkpoint, its path, the folder of a run, or ``"auto"``: the newest
            checkpoint of this very run, where there is one.
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
        eval_data: Data | None = None,
        eval_every: int | None = None,
        eval_metrics: Mapping[str, Any] | None = None,
        eval_weights: Literal["live", "ema"] = "live",
        early_stop: EarlyStop | None = None,
        resume_from: Checkpoint | str | Path | None = None,
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
            eval_data=eval_data,
            eval_every=eval_every,
            eval_metrics=eval_metrics or {},
            eval_weights=eval_weights,
            early_stop=early_stop,
            resume_from=resume_from,
            scaling=scaling_config or ScalingConfig(),
            run=run_config or RunConfig(),
            search=search_config,
            batch_dims=batch_dims,
            network=network,
            on_plan=on_plan,
            config=config or {},
        )

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
            DataError: The data raised, ended early, or changed form.
            CaptureError: The model cannot be captured.
            PlanError: The plan does not fit the model, the cluster or `scaling_config`.
            ClusterError: The cluster is not reachable, or lacks the devices.
            OptimizerError: The optimizer cannot be used, or raised.
            NonFiniteError: A loss or gradient became NaN or infinite.
            StageDiedError: A stage actor or its node was lost, more often than
                `FailureConfig.max_failures` allows.
            TrainingError: A rank failed in another way.
        """
        path = self._settings.run.folder()
        (path / "result.json").unlink(missing_ok=True)
        try:
            return self._fit(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                _write_json(
                    path / "result.json", {"error": f"{type(error).__name__}: {error}".strip()}
                )
            raise

    def _fit(self, path: Path) -> Result:
        settings, clock = self._settings, Clock()
        plan = _load(settings.plan)
        resume = checkpoint_at(settings.resume_from, path)
        opened = peek(
            settings.data,
            settings.seed,
            accumulate=settings.accumulate,
            batch_dims=settings.batch_dims,
        )
        form = BatchForm(opened.example, settings.batch_dims)
        clock.mark("data")
        with ExitStack() as stack:
            signals = stack.enter_context(terminating())
            if settings.scaling.in_process:
                stack.enter_context(_random_state_kept())
            # What is wrong with model or optimizer is told before any Ray is started.
            graph = capture(*_captured(settings, opened.example), settings.batch_dims)
            check_recipe(settings.optimizer, settings.recipe, graph.params)
            clock.mark("capture")
            made = Prepared(
                folder=path,
                opened=opened,
                form=form,
                graph=graph,
                steps=_steps(settings, opened),
                signals=signals,
                callbacks=Callbacks([EventLog(), PredictionWriter(), *settings.run.callbacks]),
                clock=clock,
                store=_store(settings, path, stack),
            )
            if resume is not None:
                made.resume, made.state = resume, resume.state
                plan = plan or _plan_of(resume, settings)
            _connect(settings, plan, made, stack)
            try:
                summary, plan = self._attempts(made, plan)
            except BaseException as error:
                made.callbacks.on_end({"error": f"{type(error).__name__}: {error}"})
                raise
        summary["startup"] = clock.summary()
        _write_json(path / "result.json", summary)
        made.callbacks.on_end(summary)
        newest = None if made.store is None else made.store.latest()
        return Result(summary, path, plan, checkpoint=newest)

    def _attempts(self, made: Prepared, plan: Plan | None) -> tuple[dict[str, Any], Plan]:
        """Trains, again after failures that may pass."""
        settings, failures = self._settings, 0
        allowed = settings.run.failure_config.max_failures
        while True:
            cluster = _devices(settings, plan, made)
            if plan is not None and failures and not _holds(cluster, plan):
                plan = None  # devices are gone: another plan, for those that are left
            if plan is None:
                plan = self._search(made, cluster)
                made.clock.mark("plan")
            _check_devices(plan, cluster, settings.scaling)
            plan.save(made.folder / "plan.json")
            if settings.on_plan is not None:
                settings.on_plan(plan, made.graph, cluster)
            try:
                return Attempt(settings, made, plan, cluster).go(), plan
            except (StageDiedError, CommError) as error:
                failures += 1
                if failures > allowed >= 0:
                    raise
                made.callbacks.on_event(
                    {"kind": "failure", "step": made.state.step, "text": str(error)}
                )
                made.resume = (made.store.latest() if made.store else None) or made.resume
                made.state = made.resume.state if made.resume else TrainState()

    def _search(self, made: Prepared, cluster: Cluster) -> Plan:
        # Only here does train/ need a search.
        from raypar.search.config import SearchConfig
        from raypar.search.plan import search

        settings = self._settings
        config = settings.search or SearchConfig()
        if made.resume is not None and made.graph.feels_microbatches:
            # M belongs to the recipe of such a model: it stays what it was.
            config = dataclasses.replace(config, microbatches=made.resume.plan.microbatches)
        measures = config.chosen_planner == "optuna" and config.measure != 0
        with _random_state_kept(), ExitStack() as stack:
            measurer = None
            if measures and not settings.scaling.in_process:
                measurer = stack.enter_context(self._measurer(made, cluster))
                measurer.prepare()
            found = search(made.graph, cluster, config, measurer=measurer)
        (made.folder / "search.json").write_text(found.record.to_json() + "\n")
        if found.record.stopped == "interrupted":  # a search then ends with its best; a run ends
            found.plan.save(made.folder / "plan.json")
            raise KeyboardInterrupt
        return found.plan

    def _measurer(self, made: Prepared, cluster: Cluster) -> RayMeasurer:
        from raypar.train.measure import RayMeasurer

        settings = self._settings
        return RayMeasurer(
            made.graph,
            cluster,
            made.opened.example,
            settings.optimizer,
            seed=settings.seed,
            recipe=settings.recipe,
            scaling=settings.scaling,
        )


def checkpoint_at(where: Checkpoint | str | Path | None, own: Path) -> Checkpoint | None:
    """The checkpoint that a user means.

    Args:
        where: A checkpoint, its path or URL, the folder of a run, or ``"auto"``.
        own: The run's own folder.

    Raises:
        CheckpointError: There is none (unless ``"auto"`` was meant), or it is damaged.
    """
    if where is None or isinstance(where, Checkpoint):
        return where
    if where == "auto":
        folder = own / CHECKPOINTS
        return CheckpointStore(folder).latest() if folder.is_dir() else None
    inside = Path(where) / CHECKPOINTS
    if "://" in str(where) or not inside.is_dir():
        return Checkpoint(where)
    found = CheckpointStore(inside).latest()
    if found is None:
        raise CheckpointError(
            f"resume_from: run {str(where)!r} has no good checkpoint in {str(inside)!r}; start it "
            "anew, with checkpoint_config=CheckpointConfig(every_steps=100)"
        )
    return found


def _store(settings: Settings, path: Path, stack: ExitStack) -> CheckpointStore | None:
    """Where the run's checkpoints go; None where it is to write none."""
    wanted = settings.run.checkpoint_config
    if not (wanted.at_end or wanted.every_s or wanted.every_steps):
        return None
    store = CheckpointStore(wanted.storage or path / CHECKPOINTS, wanted)
    stack.callback(store.close)
    return store


def _plan_of(resume: Checkpoint, settings: Settings) -> Plan | None:
    """The plan of a checkpoint, where it suits what the run is to have now."""
    plan, wanted = resume.plan, settings.scaling.num_workers
    if settings.search is not None and settings.search.chosen_planner != "optuna":
        return None  # the user has said how the model is to be split
    return plan if wanted in (0, "auto", len(plan.devices)) else None


def _holds(cluster: Cluster, plan: Plan) -> bool:
    return plan.devices[-1] < cluster.n_devices


def _captured(settings: Settings, example: Any) -> tuple[Any, Any, Any]:
    model, loss = settings.model_and_loss
    return model, example, loss


def _steps(settings: Settings, opened: Opened) -> int | None:
    """Optimizer steps in all, or None where only the end of the data tells."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return opened.steps_in(settings.epochs)


def _connect(settings: Settings, plan: Plan | None, made: Prepared, stack: ExitStack) -> None:
    """Connects to Ray where the run needs it; `stack` ends the connection."""
    if settings.scaling.in_process:
        return
    from raypar.train.session import connect

    wanted = settings.scaling.most
    needed = wanted if wanted is not None else len(plan.devices) if plan else 0
    session = connect(num_cpus=max(needed, os.cpu_count() or 1, _least_devices(settings)))
    stack.callback(session.close)
    made.signals.take()
    made.clock.mark("ray")


def _devices(settings: Settings, plan: Plan | None, made: Prepared) -> Cluster:
    """The devices to plan for, as they are now."""
    scaling = settings.scaling
    if scaling.in_process:
        own = max(os.cpu_count() or 1, _least_devices(settings))
        return Cluster.local(plan.devices[-1] + 1 if plan else own)
    cluster = Cluster.from_ray(device="GPU" if scaling.use_gpu else "CPU")
    made.clock.mark("cluster")
    if scaling.most is None or (plan is not None and plan.cluster == cluster.shape):
        return cluster
    return first_devices(cluster, scaling.most)


def _least_devices(settings: Settings) -> int:
    """Devices that an explicit search configuration needs."""
    counts = [getattr(settings.search, name, None) for name in ("stages", "replicas")]
    return math.prod(n for n in counts if isinstance(n, int))


def first_devices(cluster: Cluster, count: int) -> Cluster:
    """The first `count` devices of a cluster, as a cluster.

    Raises:
        ClusterError: It has fewer.
    """
    if count > cluster.n_devices:
        raise ClusterError(
            f"ScalingConfig(num_workers={count}): cluster {cluster.name!r} has "
            f"{cluster.n_devices} devices ({cluster.kind}, per node {cluster.shape}); set "
            f"num_workers={cluster.n_devices} or less, or add nodes"
        )
    nodes: list[Node] = []
    for node in cluster.nodes:
        taken = min(node.devices, count)
        count -= taken
        if taken:
            nodes.append(dataclasses.replace(node, devices=taken))
    return dataclasses.replace(cluster, nodes=tuple(nodes))


def _load(plan: Plan | str | Path) -> Plan | None:
    if isinstance(plan, Plan):
        return plan
    return None if plan == "auto" else Plan.load(plan)


def _check_devices(plan: Plan, cluster: Cluster, scaling: ScalingConfig) -> None:
    """Raises where plan, cluster and scaling disagree."""
    used = plan.devices
    most = scaling.most
    if most and len(used) > most:
        raise PlanError(
            f"the plan uses {len(used)} devices, ScalingConfig(num_workers="
            f"{scaling.num_workers}) allows {most}: set num_workers={len(used)}, or make a plan "
            "for fewer devices"
        )
    if used[-1] >= cluster.n_devices:
        raise PlanError(
            f"the plan uses device {used[-1]}, the cluster has {cluster.n_devices} devices (0 to "
            f"{cluster.n_devices - 1}; per node {cluster.shape}); the plan was made for "
            f"{plan.cluster}: make a plan for this cluster"
        )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    before = RandomState.now()
    try:
        yield
    finally:
        before.set()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
