"""What a configuration names, imported and checked: model, data, optimizer, search, devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from raypar._builders import (
    BuildData,
    BuildDataFrom,
    BuildModel,
    BuildOptimizer,
    BuildScheduler,
    name_of,
)
from raypar.comm.network import NetworkSettings
from raypar.config import STUDY_KEYS, Config, SearchSection, resolve_target
from raypar.errors import ConfigError, OptimizerError, did_you_mean
from raypar.graph.autocast import AUTOCAST_DTYPES
from raypar.search.config import SearchConfig
from raypar.search.planners.base import get_planner
from raypar.train.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from raypar.train.loggers.registry import make_loggers
from raypar.train.loop import EarlyStop

_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.float32,
    "fp16": torch.float32,
}
"""Of parameters: bf16 and fp16 are autocast over fp32."""
_STEPS = 100
"""Steps of a run that says neither steps nor epochs."""


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
    given = config.data
    options: dict[str, Any] = {
        name: value
        for name, value, default in (
            ("shuffle", given.shuffle, False),
            ("drop_last", given.drop_last, True),
            ("num_workers", given.num_workers, 0),
        )
        if value != default
    }
    return _data(config, "data", given.target, given.kwargs, options)


def evaluation_of(config: Config) -> BuildData | None:
    """The data source of evaluations that `config` stands for."""
    section = config.evaluation
    if section.target is None:
        return None
    return _data(config, "evaluation", section.target, section.kwargs, {})


def _data(
    config: Config, section: str, name: str, kwargs: dict[str, Any], options: dict[str, Any]
) -> BuildData:
    target = resolve_target(name, f"{section}.target")
    if "global_batch" in kwargs:
        raise ConfigError(f"{section}.kwargs.global_batch: say it once, as data.global_batch")
    taken = _parameters(target)
    size = config.data.global_batch
    # What makes batches is told their size; a data set of samples need not know it.
    if "global_batch" in taken or "**" in taken:
        kwargs = {"global_batch": size, **kwargs}
    _check_call(target, section, **kwargs)
    build = BuildDataFrom if "start_sample" in taken else BuildData
    return build(target, kwargs, _DTYPES[config.model.precision], section, size, options)


def _parameters(target: Callable[..., Any]) -> set[str]:
    """Names of what a callable takes; ``**`` where it takes any keyword."""
    try:
        found = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a C function without a signature
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in found}


def optimizer_of(config: Config) -> BuildOptimizer:
    """The optimizer function that `config` stands for."""
    target = resolve_target(config.optimizer.target, "optimizer.target")
    _check_call(target, "optimizer", [], **config.optimizer.kwargs)
    groups = config.optimizer.groups
    for group in groups:
        if not isinstance(group.get("match"), str):
            raise ConfigError(
                f"optimizer.groups: {group} has no match: give a pattern of parameter names, for "
                "example {match: '*.bias', weight_decay: 0.0}"
            )
    return BuildOptimizer(target, config.optimizer.kwargs, tuple(groups))


def scheduler_of(config: Config) -> BuildScheduler | None:
    """The learning-rate scheduler that `config` stands for."""
    if config.scheduler.target is None:
        return None
    target = resolve_target(config.scheduler.target, "scheduler.target")
    _check_call(target, "scheduler", None, **config.scheduler.kwargs)
    return BuildScheduler(target, config.scheduler.kwargs)


def check_config(config: Config) -> None:
    """Imports what `config` names, and checks that it can be called as it says.

    Raises:
        ConfigError: Something cannot; names the key.
    """
    model_of(config)
    loss_of(config)
    data_of(config)
    evaluation_of(config)
    scheduler_of(config)
    search_of(config)
    scaling_of(config)
    run_of(config)
    early_stop_of(config)
    network_of(config)


def search_of(config: Config) -> SearchConfig:
    """The search settings that `config` stands for.

    Raises:
        ConfigError: An option of the study is given, and the planner makes none.
    """
    section = config.search
    same = [f.name for f in fields(SearchConfig) if f.name in type(section).model_fields]
    keys: dict[str, Any] = {name: getattr(section, name) for name in same}
    wanted = SearchConfig(
        **keys | {"seeds": "auto" if section.seeds == "auto" else tuple(section.seeds)},
        microbatches=config.train.microbatches,
        schedule=config.train.schedule,
        optimizer_states=states_of(config),
    )
    if wanted.chosen_planner != "optuna":
        obeyed = {"budget_s"} if get_planner(wanted.chosen_planner).obeys_budget else set()
        for name in STUDY_KEYS:
            if (
                name not in obeyed
                and getattr(config.search, name) != SearchSection.model_fields[name].default
            ):
                raise ConfigError(
                    f"search.{name} is {getattr(config.search, name)!r}, but planner "
                    f"{wanted.chosen_planner!r} makes one plan and would ignore it: set "
                    f"search.planner: optuna, or remove search.{name}"
                )
    return wanted


def states_of(config: Config) -> int:
    """Tensors kept for each parameter: the optimizer's, and the average of the weights."""
    return optimizer_states(optimizer_of(config)) + (config.train.ema_decay is not None)


def optimizer_states(build: BuildOptimizer) -> int:
    """How many tensors an optimizer keeps per parameter: found by one step on a small one.

    Raises:
        OptimizerError: The optimizer cannot be built, or its step raises.
    """
    param = torch.nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros_like(param)
    try:
        optimizer = build([("parameter", param)])
        optimizer.step()
    except Exception as error:
        raise OptimizerError(
            f"the optimizer failed on a parameter of shape (2, 2): {type(error).__name__}: {error}"
        ) from error
    kept = optimizer.state[param].values()
    return sum(isinstance(t, torch.Tensor) and t.shape == param.shape for t in kept)


def scaling_of(config: Config) -> ScalingConfig:
    """The part of the cluster that `config` asks for."""
    mesh = config.mesh
    return ScalingConfig(
        num_workers=tuple(mesh.num_workers)  # type: ignore[arg-type]
        if isinstance(mesh.num_workers, list)
        else mesh.num_workers,
        placement_timeout_s=mesh.placement_timeout_s,
        scale_up_timeout_s=mesh.scale_up_timeout_s,
        start_timeout_s=mesh.start_timeout_s,
        use_gpu=mesh.device == "gpu",
        cpus_per_worker=mesh.cpus_per_worker,
        threads_per_worker=mesh.threads_per_worker,
    )


def run_of(config: Config) -> RunConfig:
    """Where the files of `config` go, and what happens after failures."""
    checkpoint = config.checkpoint
    return RunConfig(
        name=config.run.name,
        storage_path=config.run.storage_path,
        log_every=config.run.log_every,
        checkpoint_config=CheckpointConfig(
            storage=checkpoint.storage,
            every_steps=checkpoint.every_steps,
            every_s=checkpoint.every_s,
            at_end=checkpoint.at_end,
            num_to_keep=checkpoint.keep,
            score_attribute=checkpoint.best_of,
            score_order=checkpoint.best_order,
        ),
        failure_config=FailureConfig(max_failures=config.run.max_failures),
        callbacks=make_loggers(config.run.loggers),
    )


def steps_of(config: Config) -> int | None:
    """Optimizer steps, or None where epochs say when the run ends."""
    train = config.train
    return _STEPS if train.steps is None and train.epochs is None else train.steps


def autocast_of(config: Config) -> Any:
    """The precision that autocast chooses ops for, or None."""
    precision = config.model.precision
    return precision if precision in AUTOCAST_DTYPES else None


def early_stop_of(config: Config) -> EarlyStop | None:
    """When `config` ends a run early, or None."""
    section = config.evaluation
    if section.stop_metric is None:
        return None
    return EarlyStop(
        metric=section.stop_metric,
        patience=section.stop_patience,
        min_delta=section.stop_min_delta,
        mode=section.stop_mode,
    )


def network_of(config: Config) -> NetworkSettings:
    """How the ranks of `config` reach each other."""
    comm = config.comm
    return NetworkSettings(
        comm.interface,
        None if comm.port_range is None else (comm.port_range[0], comm.port_range[1]),
        comm.nccl_env,
    )


def _check_call(target: Callable[..., Any], section: str, *args: Any, **kwargs: Any) -> None:
    """Tells a call that cannot work as the config key it comes from, before anything starts."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a C function without a signature: the call itself will tell
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((name for name in kwargs if name not in signature.parameters), "")
        near = did_you_mean(unknown, signature.parameters) if unknown else ""
        raise ConfigError(
            f"{section}.kwargs: {name_of(target)} cannot be called with "
            f"{', '.join(kwargs) or 'no arguments'}: {error}.{near} It takes {_names(signature)}"
        ) from None


def _names(signature: inspect.Signature) -> str:
    return ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values())
