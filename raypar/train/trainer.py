"""The trainer: model, loss, optimizer and data in; trained model, metrics and plan out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from raypar.errors import ClusterError, CommError, PlanError, StageDiedError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import Plan
from raypar.stages.spec import OptimizerFn
from raypar.train.attempt import Attempt, Clock, Prepared
from raypar.train.callbacks import Callbacks
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import BatchForm, Data, RandomState, peek
from raypar.train.optimizer import check_recipe
from raypar.train.result import Result
from raypar.train.settings import Settings
from raypar.train.signals import terminating

if TYPE_CHECKING:
    from raypar.train.measure import RayMeasurer


class Trainer:
    """Trains one model over the devices of a cluster, exactly as one process would.

    Args:
        model_fn: Builds the module.
        loss_fn: Maps the module's output (and batch) to the loss; None where the output is the
            loss or has it as ``.loss``. See `raypar.capture`.
        optimizer: Builds the optimizer from parameters, for example
            ``lambda params: torch.optim.AdamW(params, lr=3e-4)``; called on every rank.
        data: Global batches: an iterable, a DataLoader, an iterator, or a callable that returns
            one. What can be iterated again is repeated; each batch is read exactly once, by the
            process of rank 0, where that process can open it.
        plan: ``"auto"`` searches one; or a Plan, or the path of a plan file.
        steps: Optimizer steps.
        time_limit_s: Training seconds after which the run ends early, over all attempts.
        seed: Seed of initialisation, of dropout, and of the loader's random order.
        clip_norm: Limit of the global gradient norm, or None.
        early_stop: Ends the run when evaluations no longer get better.
        scaling_config: How much of the cluster to use.
        run_config: Where the files go, checkpoints, what happens after failures.
        search_config: How a plan is searched (`raypar.SearchConfig`), for ``plan="auto"``.
        batch_dims: Batch dim of every tensor of a batch, as for `raypar.capture`.
        on_plan: Called with plan, graph and cluster once they are known, before anything starts.

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
        time_limit_s: float | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        plan: Plan | str | Path | Literal["auto"] = "auto",
        seed: int = 0,
        clip_norm: float | None = None,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        search_config: Any = None,
        batch_dims: Any = None,
        on_plan: Callable[[Plan, OpGraph, Cluster], None] | None = None,
    ) -> None:
        self._settings = Settings(
            model_fn=model_fn,
            optimizer=optimizer,
            data=data,
            steps=steps,
            time_limit_s=time_limit_s,
            loss_fn=loss_fn,
            plan=plan,
            seed=seed,
            clip_norm=clip_norm,
            scaling=scaling_config or ScalingConfig(),
            run=run_config or RunConfig(),
            search=search_config,
            batch_dims=batch_dims,
            on_plan=on_plan,
        )

    def fit(self) -> Result:
        """Trains, and writes the run's folder.

        The folder ``<storage_path>/<name>/`` holds ``plan.json``, ``metrics.jsonl`` (one line per
        step), ``result.json`` and ``model.pt`` (the state dict under the model's own names); where
        a plan was searched also ``search.json``, what the search looked at. A search on Ray runs
        some steps of plans that could be the best (`SearchConfig.measure`), on the first batch and
        with the model as it is initialised; training then starts afresh.

        Returns:
            Metrics, folder and plan.

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
        opened = peek(settings.data, settings.seed)
        form = BatchForm(opened.example, settings.batch_dims)
        clock.mark("data")
        with ExitStack() as stack:
            signals = stack.enter_context(terminating())
            if settings.scaling.in_process:
                stack.enter_context(_random_state_kept())
            # What is wrong with model or optimizer is told before any Ray is started.
            graph = capture(
                settings.model_fn, opened.example, settings.loss_fn, settings.batch_dims
            )
            check_recipe(settings.optimizer, settings.recipe, graph.params)
            clock.mark("capture")
            assert settings.steps is not None
            made = Prepared(
                path, opened, form, graph, settings.steps, signals,
                Callbacks(settings.run.callbacks), clock,
            )  # fmt: skip
            _connect(settings, plan, made, stack)
            summary, plan = self._attempts(made, plan)
        summary["startup"] = clock.summary()
        _write_json(path / "result.json", summary)
        made.callbacks.on_end(summary)
        return Result(summary, path, plan)

    def _attempts(self, made: Prepared, plan: Plan | None) -> tuple[dict[str, Any], Plan]:
        """Trains, again after failures that may pass."""
        settings, failures = self._settings, 0
        allowed = settings.run.failure_config.max_failures
        while True:
            cluster = _devices(settings, plan, made)
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

    def _search(self, made: Prepared, cluster: Cluster) -> Plan:
        # Only here does train/ need a search.
        from raypar.search.config import SearchConfig
        from raypar.search.plan import search

        settings = self._settings
        config = settings.search or SearchConfig()
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
        return Cluster.local(len(plan.devices) if plan else own)
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
