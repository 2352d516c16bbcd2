"""From a configuration to the calls it stands for; the command line and the examples share it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raypar.compat import pytree
from raypar.config import IN_A_PLAN_FILE, STUDY_KEYS, Config, SearchSection, resolve_target
from raypar.errors import ConfigError, DataError, OptimizerError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.explain import explain
from raypar.search.config import SearchConfig
from raypar.search.ladder import Ladder, Rung, ladder, sizes_of
from raypar.search.plan import Found, Progress, search
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.result import Result
from raypar.train.trainer import Trainer

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class BuildModel:
    """Builds the configured model in the configured precision; picklable by its target's name."""

    target: Callable[..., torch.nn.Module]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    def __call__(self) -> torch.nn.Module:
        """The model.

        Raises:
            ConfigError: The target makes something else.
        """
        model = self.target(**self.kwargs)
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"model.target: {_name(self.target)}(...) returned {type(model).__name__}, "
                "not a torch.nn.Module"
            )
        return model.to(self.dtype)


@dataclass(frozen=True)
class BuildData:
    """Opens the configured data; floating-point tensors come in the configured precision."""

    target: Callable[..., Iterable[Any]]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    def __call__(self) -> Iterable[Any]:
        """The batches.

        Raises:
            ConfigError: The target makes something else.
        """
        made = self.target(**self.kwargs)
        if not isinstance(made, Iterable):
            raise ConfigError(
                f"data.target: {_name(self.target)}(...) returned {type(made).__name__}, "
                "not an iterable of batches"
            )
        # What can be gone through once stays so: who looks at the first batch must not lose it.
        cast = _Cast(made, self.dtype)
        return iter(cast) if isinstance(made, Iterator) else cast


@dataclass(frozen=True)
class _Cast:
    batches: Iterable[Any]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Any]:
        def cast(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return leaf.to(self.dtype)
            return leaf

        for batch in self.batches:
            yield pytree.tree_map(cast, batch)


@dataclass(frozen=True)
class BuildOptimizer:
    """Builds the configured optimizer from parameters."""

    target: Callable[..., torch.optim.Optimizer]
    kwargs: dict[str, Any]

    def __call__(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return self.target(parameters, **self.kwargs)


def model_of(config: Config) -> BuildModel:
    """The model function that `config` stands for."""
    target = resolve_target(config.model.target, "model.target")
    _check_call(target, "model", **config.model.kwargs)
    return BuildModel(target, config.model.kwargs, _DTYPES[config.model.precision])


def loss_of(config: Config) -> Callable[..., torch.Tensor] | None:
    """The loss function that `config` stands for."""
    return None if config.model.loss is None else resolve_target(config.model.loss, "model.loss")


def data_of(config: Config) -> BuildData:
    """The data source that `config` stands for."""
    target = resolve_target(config.data.target, "data.target")
    if "global_batch" in config.data.kwargs:
        raise ConfigError("data.kwargs.global_batch: say it once, as data.global_batch")
    kwargs = {"global_batch": config.data.global_batch, **config.data.kwargs}
    _check_call(target, "data", **kwargs)
    return BuildData(target, kwargs, _DTYPES[config.model.precision])


def optimizer_of(config: Config) -> BuildOptimizer:
    """The optimizer function that `config` stands for."""
    target = resolve_target(config.optimizer.target, "optimizer.target")
    _check_call(target, "optimizer", [], **config.optimizer.kwargs)
    return BuildOptimizer(target, config.optimizer.kwargs)


def search_of(config: Config) -> SearchConfig:
    """The search settings that `config` stands for.

    Raises:
        ConfigError: An option of the study is given, and the planner makes none.
    """
    wanted = SearchConfig(
        planner=config.search.planner,
        stages=config.search.stages,
        replicas=config.search.replicas,
        microbatches=config.train.microbatches,
        schedule=config.train.schedule,
        tensor=config.search.tensor,
        chunks=config.search.chunks,
        recompute=config.search.recompute,
        zero=config.search.zero,
        memory_fraction=config.search.memory_fraction,
        optimizer_states=optimizer_states(optimizer_of(config)),
        sampler=config.search.sampler,
        trials=config.search.trials,
        budget_s=config.search.budget_s,
        seed=config.search.seed,
        seeds="auto" if config.search.seeds == "auto" else tuple(config.search.seeds),
        cost_model=config.search.cost_model,
        measure=config.search.measure,
        storage=config.search.storage,
        cache=config.search.cache,
        manual=config.search.manual,
    )
    if wanted.chosen_planner != "optuna":
        for name in STUDY_KEYS:
            if getattr(config.search, name) != SearchSection.model_fields[name].default:
                raise ConfigError(
                    f"search.{name} is {getattr(config.search, name)!r}, but planner "
                    f"{wanted.chosen_planner!r} makes one plan and would ignore it: set "
                    f"search.planner: optuna, or remove search.{name}"
                )
    return wanted


def cluster_of(config: Config, cluster_file: str | Path | None = None) -> Cluster:
    """The cluster to plan for: a file's, the given number of CPUs, or this machine's CPUs."""
    if cluster_file is not None:
        return Cluster.load(cluster_file)
    workers = config.mesh.num_workers
    return Cluster.local(None if workers in ("auto", 0) else int(workers))


def capture_of(config: Config) -> OpGraph:
    """Captures the configured model on the data's first batch."""
    batches = iter(data_of(config)())
    try:
        example = next(batches)
    except StopIteration:
        raise DataError(f"data.target: {config.data.target} yielded no batch") from None
    return capture(model_of(config), example, loss_of(config))


def plan_of(
    config: Config, cluster_file: str | Path | None = None, plan_file: str | Path | None = None
) -> tuple[Plan, OpGraph, Cluster]:
    """Captures and plans, or reads the plan, without training and without Ray."""
    if plan_file is None:
        found, graph, cluster = found_of(config, cluster_file)
        return found.plan, graph, cluster
    given = Plan.load(plan_file)
    return given, capture_of(config), cluster_of(config, cluster_file)


def found_of(
    config: Config, cluster_file: str | Path | None = None, progress: Progress | None = None
) -> tuple[Found, OpGraph, Cluster]:
    """Captures and plans, and tells how the plan was found; `progress` hears of every trial."""
    options = search_of(config)
    cluster = cluster_of(config, cluster_file)
    graph = capture_of(config)
    return search(graph, cluster, options, progress=progress), graph, cluster


def ladder_of(
    config: Config,
    sizes: str,
    cluster_file: str | Path | None = None,
    progress: Callable[[Rung], None] | None = None,
) -> Ladder:
    """Captures once and plans for several sizes of the cluster.

    Args:
        config: The run; its budget is that of one size.
        sizes: As people write them, such as ``2..16``.
        cluster_file: The largest cluster; default: the one that the configuration would get.
        progress: Is told of every size.

    Raises:
        ConfigError: The sizes are no sizes, or the cluster does not have them.
    """
    options = search_of(config)
    cluster = cluster_of(config, cluster_file)
    wanted = sizes_of(sizes, cluster.n_devices)
    return ladder(capture_of(config), cluster, wanted, options, progress=progress)


def shared_cores(cluster: Cluster, *, virtual: bool = False) -> int | None:
    """Cores that the ranks of this machine share, where it has fewer cores than ranks.

    Args:
        cluster: The cluster that is planned for.
        virtual: Whether it was given as a file, and is not this machine.
    """
    own = os.cpu_count() or 1
    return own if not virtual and len(cluster.nodes) == 1 and cluster.n_devices > own else None


def optimizer_states(build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> int:
    """How many tensors an optimizer keeps per parameter: found by one step on a small one.

    Raises:
        OptimizerError: The optimizer cannot be built, or its step raises.
    """
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros_like(param)
    try:
        optimizer = build([param])
        optimizer.step()
    except Exception as error:
        raise OptimizerError(
            f"the optimizer failed on a parameter of shape (2, 2): {type(error).__name__}: {error}"
        ) from error
    kept = optimizer.state[param].values()
    return sum(isinstance(t, torch.Tensor) and t.shape == param.shape for t in kept)


def explained(
    config: Config,
    made: Plan,
    graph: OpGraph,
    cluster: Cluster,
    *,
    virtual: bool = False,
    lists: bool = False,
) -> str:
    """`raypar.explain` with what the configuration and this machine say.

    Args:
        config: The run.
        made: Its plan.
        graph: Its model.
        cluster: The cluster of the plan.
        virtual: Whether the cluster was given as a file, and is not this machine.
        lists: As in `raypar.explain`.
    """
    return explain(
        made,
        graph,
        cluster,
        cores=shared_cores(cluster, virtual=virtual),
        optimizer_states=optimizer_states(optimizer_of(config)),
        lists=lists,
    )


def scaling_of(config: Config) -> ScalingConfig:
    """The part of the cluster that `config` asks for."""
    mesh = config.mesh
    return ScalingConfig(
        num_workers=mesh.num_workers,
        use_gpu=mesh.device == "gpu",
        cpus_per_worker=mesh.cpus_per_worker,
        threads_per_worker=mesh.threads_per_worker,
    )


def train_config(config: Config) -> Result:
    """Trains what `config` says.

    The run's folder also gets ``config.resolved.yaml``: the same configuration with what every
    ``auto`` became, so that the run can be repeated; the plan is printed before the first step.
    """
    wanted = RunConfig(
        name=config.run.name,
        storage_path=config.run.storage_path,
        log_every=config.run.log_every,
    )
    folder = wanted.folder()

    def on_plan(made: Plan, graph: OpGraph, cluster: Cluster) -> None:
        write_resolved(config, made, folder)
        if config.run.log_every:
            print(explained(config, made, graph, cluster), flush=True)

    trainer = Trainer(
        model_of(config),
        loss_fn=loss_of(config),
        optimizer=optimizer_of(config),
        data=data_of(config),
        plan="auto",
        steps=config.train.steps,
        seed=config.train.seed,
        clip_norm=config.train.clip_norm,
        scaling_config=scaling_of(config),
        run_config=dataclasses.replace(wanted, name=folder.name),
        search_config=search_of(config),
        on_plan=on_plan,
    )
    return trainer.fit()


def write_resolved(config: Config, made: Plan, folder: Path) -> None:
    """Writes ``config.resolved.yaml`` into a run's folder, beside its ``plan.json``.

    What `uniform` makes is told in full by its keys. What a search found is not, and another
    calibration may find something else: there the plan file itself is named.
    """
    became: dict[str, Any] = {"run.name": folder.name}
    if config.mesh.num_workers == "auto":
        became["mesh.num_workers"] = len(made.devices)
    if search_of(config).chosen_planner in ("uniform", "manual"):
        if not isinstance(config.search.manual, str):
            became |= _uniform_keys(config, made)
    else:
        for section, name in IN_A_PLAN_FILE:
            fields = type(getattr(config, section)).model_fields
            became[f"{section}.{name}"] = fields[name].default
        for name in STUDY_KEYS:
            became[f"search.{name}"] = SearchSection.model_fields[name].default
        became["search.planner"] = "manual"
        became["search.manual"] = str(folder / "plan.json")
    (folder / "config.resolved.yaml").write_text(
        config.resolved(**became).to_yaml(), encoding="utf-8"
    )


def _uniform_keys(config: Config, made: Plan) -> dict[str, Any]:
    first = made.stages[0]
    found: dict[str, Any] = {
        "search.stages": len(made.stages),
        "search.replicas": made.replicas,
        "search.tensor": math.prod(size for _, size in first.mesh.inner),
        "train.microbatches": made.microbatches,
        "train.schedule": made.schedule.name,
    }
    if config.search.planner == "auto":
        found["search.planner"] = "uniform"
    if config.search.recompute == "auto":
        found["search.recompute"] = first.memory.recompute
    if config.search.zero == "auto":
        found["search.zero"] = first.memory.zero
    return found


def _check_call(target: Callable[..., Any], section: str, *args: Any, **kwargs: Any) -> None:
    """Tells a call that cannot work as the config key it comes from, before anything starts."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a C function without a signature: the call itself will tell
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{section}.kwargs: {_name(target)} cannot be called with "
            f"{', '.join(kwargs) or 'no arguments'}: {error}; it takes {_names(signature)}"
        ) from None


def _names(signature: inspect.Signature) -> str:
    return ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values())


def _name(target: Any) -> str:
    target = getattr(target, "func", target)
    return str(getattr(target, "__qualname__", target))
