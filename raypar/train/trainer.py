"""The trainer: model, loss, optimizer and data in; trained model, metrics and plan out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from raypar.errors import ClusterError, ConfigError, PlanError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.run import Run, StepResult
from raypar.stages.spec import OptimizerFn, RankSpec
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import BatchForm, Data, Opened, RandomState, peek
from raypar.train.feed import DataFeed, HeldBatches
from raypar.train.metrics import Display, MetricsLog, tokens_of
from raypar.train.optimizer import check_optimizer, check_optimizer_on
from raypar.train.result import Result
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
        seed: Seed of initialisation, of dropout, and of the loader's random order.
        clip_norm: Limit of the global gradient norm, or None.
        scaling_config: How much of the cluster to use.
        run_config: Where the files go.
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
        steps: int,
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
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps is {steps!r}; give a number of at least 1, for example 100")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(
                f"clip_norm is {clip_norm!r}; give a limit above 0, for example 1.0, or None"
            )
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed is {seed!r}; give a whole number of at least 0")
        self._model_fn = model_fn
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._data = data
        self._plan = plan
        self._steps = steps
        self._seed = seed
        self._clip_norm = clip_norm
        self._scaling = scaling_config or ScalingConfig()
        self._run_config = run_config or RunConfig()
        self._search_config = search_config
        self._batch_dims = batch_dims
        self._on_plan = on_plan

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
            StageDiedError: A stage actor or its node was lost.
            TrainingError: A rank failed in another way.
        """
        path = self._run_config.folder()
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
        clock = _Clock()
        plan = _load(self._plan)
        opened = peek(self._data, self._seed)
        form = BatchForm(opened.example, self._batch_dims)
        clock.mark("data")
        with ExitStack() as stack:
            arm = stack.enter_context(terminating())
            if self._scaling.num_workers == 0:
                stack.enter_context(_random_state_kept())
            # What is wrong with model or optimizer is told before any Ray is started.
            graph = capture(self._model_fn, opened.example, self._loss_fn, self._batch_dims)
            check_optimizer(self._optimizer, _parameters(graph))
            clock.mark("capture")
            cluster = self._reach_cluster(stack, plan, clock, arm)
            if plan is None:
                plan = self._search(graph, cluster, opened, path)
                clock.mark("plan")
            _check_devices(plan, cluster, self._scaling)
            plan.save(path / "plan.json")
            if self._on_plan is not None:
                self._on_plan(plan, graph, cluster)
            specs = self._compile(graph, plan)
            check_optimizer_on(specs, _parameters(graph))
            clock.mark("compile")
            run = self._make_run(stack, specs, plan, cluster, opened, form)
            stack.callback(run.close)
            parts = run.start()
            clock.mark("start")
            for name, seconds in parts.items():
                clock.seconds[f"start.{name}"] = seconds
            summary = self._train(run, path, form, clock)
            torch.save(run.state_dict(), path / "model.pt")
        _write_json(path / "result.json", summary)
        return Result(summary, path, plan)

    # ---- before the first step ------------------------------------------------------------

    def _reach_cluster(
        self, stack: ExitStack, plan: Plan | None, clock: _Clock, arm: Callable[[], None]
    ) -> Cluster:
        """The devices to plan for; connects to Ray where the run needs it."""
        wanted = self._scaling.num_workers
        if wanted == 0:
            count = len(plan.devices) if plan else max(os.cpu_count() or 1, self._least_devices())
            return Cluster.local(count)
        from raypar.train.session import connect

        needed = wanted if wanted != "auto" else len(plan.devices) if plan else 0
        cores = os.cpu_count() or 1
        session = connect(num_cpus=max(needed, cores, self._least_devices()))
        stack.callback(session.close)
        arm()
        clock.mark("ray")
        cluster = Cluster.from_ray(device="GPU" if self._scaling.use_gpu else "CPU")
        clock.mark("cluster")
        if wanted == "auto" or (plan is not None and plan.cluster == cluster.shape):
            return cluster
        return first_devices(cluster, wanted)

    def _least_devices(self) -> int:
        """Devices that an explicit search configuration needs."""
        counts = [getattr(self._search_config, name, None) for name in ("stages", "replicas")]
        numbers = [n for n in counts if isinstance(n, int)]
        found = 1
        for n in numbers:
            found *= n
        return found

    def _search(self, graph: OpGraph, cluster: Cluster, opened: Opened, path: Path) -> Plan:
        # Only here does train/ need a search.
        from raypar.search.config import SearchConfig
        from raypar.search.plan import search

        config = self._search_config or SearchConfig()
        measures = config.chosen_planner == "optuna" and config.measure != 0
        with _random_state_kept(), ExitStack() as stack:
            measurer = None
            if measures and self._scaling.num_workers != 0:
                measurer = stack.enter_context(self._measurer(graph, cluster, opened))
                measurer.prepare()
            found = search(graph, cluster, config, measurer=measurer)
        (path / "search.json").write_text(found.record.to_json() + "\n")
        if found.record.stopped == "interrupted":  # a search then ends with its best; a run ends
            found.plan.save(path / "plan.json")
            raise KeyboardInterrupt
        return found.plan

    def _measurer(self, graph: OpGraph, cluster: Cluster, opened: Opened) -> RayMeasurer:
        from raypar.train.measure import RayMeasurer

        return RayMeasurer(
            graph,
            cluster,
            opened.example,
            self._optimizer,
            seed=self._seed,
            clip_norm=self._clip_norm,
            scaling=self._scaling,
        )

    def _compile(self, graph: OpGraph, plan: Plan) -> list[RankSpec]:
        return compile_plan(
            graph,
            plan,
            optimizer=self._optimizer,
            seed=self._seed,
            clip_norm=self._clip_norm,
            threads=self._scaling.threads(plan),
            accelerator=self._scaling.use_gpu,
        )

    def _make_run(
        self,
        stack: ExitStack,
        specs: list[RankSpec],
        plan: Plan,
        cluster: Cluster,
        opened: Opened,
        form: BatchForm,
    ) -> Run:
        if self._scaling.num_workers == 0:
            from raypar.stages.local import LocalRun

            return LocalRun(specs, feed=DataFeed(HeldBatches(opened), form, specs))
        from raypar.stages.remote import RayRun
        from raypar.train.relay import shipped

        source = shipped(self._data, opened, self._seed, self._steps, stack)
        return RayRun(
            specs,
            plan=plan,
            cluster=cluster,
            feed=DataFeed(source, form, specs),
            name=f"raypar-{self._run_config.name}" if self._run_config.name else "raypar",
            use_gpu=self._scaling.use_gpu,
            cpus_per_rank=self._scaling.cpus_per_worker,
            placement_timeout_s=self._scaling.placement_timeout_s,
        )

    # ---- steps ----------------------------------------------------------------------------

    def _train(self, run: Run, path: Path, form: BatchForm, clock: _Clock) -> dict[str, Any]:
        log = MetricsLog(path / "metrics.jsonl", form.spec.size, tokens_of(form), run.infos)
        display = Display(self._steps, self._run_config.log_every)

        for note in run.notes:
            display.say(note)

        def on_report(result: StepResult) -> None:
            if not log.steps:
                clock.mark("first_step")
            display.show(log.add(result))

        try:
            with display:
                run.train(0, self._steps, on_report)
        finally:
            log.close()
        startup = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
        startup["total"] = round(clock.total, 3)
        return {
            **log.summary(),
            "startup": startup,
            "driver_share": getattr(run, "driver_share", None),
        }


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


def _parameters(graph: OpGraph) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
    return [
        (shape, getattr(torch, dtype.removeprefix("torch.")), trained)
        for shape, dtype, trained in graph.params.values()
    ]


def _load(plan: Plan | str | Path) -> Plan | None:
    if isinstance(plan, Plan):
        return plan
    return None if plan == "auto" else Plan.load(plan)


def _check_devices(plan: Plan, cluster: Cluster, scaling: ScalingConfig) -> None:
    """Raises where plan, cluster and scaling disagree."""
    used = plan.devices
    if scaling.num_workers not in ("auto", 0) and len(used) > int(scaling.num_workers):
        raise PlanError(
            f"the plan uses {len(used)} devices, ScalingConfig(num_workers="
            f"{scaling.num_workers}) allows {scaling.num_workers}: set num_workers={len(used)}, or "
            "make a plan for fewer devices"
        )
    if used[-1] >= cluster.n_devices:
        raise PlanError(
            f"the plan uses device {used[-1]}, the cluster has {cluster.n_devices} devices (0 to "
            f"{cluster.n_devices - 1}; per node {cluster.shape}); the plan was made for "
            f"{plan.cluster}: make a plan for this cluster"
        )


class _Clock:
    """Seconds of each part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._began


@contextmanager
def _random_state_kept() -> Iterator[None]:
    before = RandomState.now()
    try:
        yield
    finally:
        before.set()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
