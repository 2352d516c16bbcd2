"""From a configuration to the calls it stands for; the command line and the examples share it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raypar._config_checks import IN_A_PLAN_FILE
from raypar._targets import (
    autocast_of,
    data_of,
    early_stop_of,
    evaluation_of,
    loss_of,
    model_of,
    network_of,
    optimizer_of,
    run_of,
    scaling_of,
    scheduler_of,
    search_of,
    states_of,
    steps_of,
)
from raypar.config import STUDY_KEYS, Config, SearchSection, load_config
from raypar.errors import CheckpointError, ConfigError, DataError
from raypar.graph.capture import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.report.explain import Explanation, explanation
from raypar.search.ladder import Ladder, Rung, ladder, sizes_of
from raypar.search.plan import Found, Progress, search
from raypar.train.result import Result
from raypar.train.trainer import Trainer, checkpoint_at


def cluster_of(config: Config, cluster_file: str | Path | None = None) -> Cluster:
    """The cluster to plan for: a file's, the given number of CPUs, or this machine's CPUs."""
    if cluster_file is not None:
        return Cluster.load(cluster_file)
    workers = config.mesh.num_workers
    if isinstance(workers, list):
        workers = workers[-1]
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


def explained(
    config: Config,
    made: Plan,
    graph: OpGraph,
    cluster: Cluster,
    *,
    virtual: bool = False,
    lists: bool = False,
) -> Explanation:
    """`raypar.explain` with what the configuration and this machine say.

    Args:
        config: The run.
        made: Its plan.
        graph: Its model.
        cluster: The cluster of the plan.
        virtual: Whether the cluster was given as a file, and is not this machine.
        lists: As in `raypar.explain`.
    """
    return explanation(
        made,
        graph,
        cluster,
        cores=shared_cores(cluster, virtual=virtual),
        optimizer_states=states_of(config),
        lists=lists,
    )


def trainer_of(config: Config) -> Trainer:
    """The trainer that a configuration stands for.

    Raises:
        ConfigError: Something that it names cannot be imported, or called as it says.
    """
    return Trainer(
        model_of(config),
        loss_fn=loss_of(config),
        optimizer=optimizer_of(config),
        data=data_of(config),
        plan="auto",
        steps=steps_of(config),
        epochs=config.train.epochs,
        time_limit_s=config.train.time_limit_s,
        seed=config.train.seed,
        clip_norm=config.train.clip_norm,
        scheduler=scheduler_of(config),
        precision=autocast_of(config),
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
        engine=config.train.engine,
        eval_data=evaluation_of(config),
        eval_every=config.evaluation.every_steps,
        eval_weights=config.evaluation.weights,
        early_stop=early_stop_of(config),
        init_from=config.model.init_from,
        scaling_config=scaling_of(config),
        run_config=run_of(config),
        search_config=search_of(config),
        network=network_of(config),
        config=config.model_dump(),
    )


def train_config(
    config: Config, *, resume: bool = False, checkpoint: str | Path | None = None
) -> Result:
    """Trains what `config` says.

    The run's folder also gets ``config.resolved.yaml``: the same configuration with what every
    ``auto`` became, so that the run can be repeated; the plan is printed before the first step.

    Args:
        config: The run.
        resume: Whether it goes on from the newest checkpoint in its folder, where there is one.
        checkpoint: Goes on from this one.

    Raises:
        ConfigError: `resume` without a ``run.name``, whose folder holds the checkpoints.
    """
    if resume and config.run.name is None:
        raise ConfigError(
            "--resume goes on in the folder of run.name, which is null: give it a name, for "
            "example --set run.name=gpt"
        )
    wanted = run_of(config)
    folder = wanted.folder()

    def on_plan(made: Plan, graph: OpGraph, cluster: Cluster) -> None:
        write_resolved(config, made, folder)
        if config.run.log_every:
            print(explained(config, made, graph, cluster).text, flush=True)

    if config.run.log_every and config.mesh.num_workers != 0:
        print(f"run {folder.name}: {_ray_in_words()}", flush=True)
    trainer = trainer_of(config).changed(
        run=dataclasses.replace(wanted, name=folder.name),
        resume_from=checkpoint or ("auto" if resume else None),
        on_plan=on_plan,
    )
    return trainer.fit()


def _ray_in_words() -> str:
    """Which Ray a run is about to use: to bring one up can take a minute without a word."""
    import ray  # plans are made without it

    address = os.environ.get("RAY_ADDRESS", "local")
    if ray.is_initialized():
        return "on the Ray of this process"
    if address in ("", "local"):
        return "starting a Ray of its own on this machine (RAY_ADDRESS names no other)"
    return f"on the Ray at {address}"


def verify_config(config: Config, plan_file: str | Path | None = None, steps: int = 1) -> str:
    """Runs a plan beside the unsplit model, in this process.

    Args:
        config: The run.
        plan_file: The plan; default: the one that the configuration would get.
        steps: Steps to compare.

    Returns:
        The first value that differs, in words; empty where none does.
    """
    from raypar.testing.verify import first_difference

    plan, graph, _ = plan_of(config, plan_file=plan_file)
    batches = list(itertools.islice(iter(data_of(config)()), steps))
    found = first_difference(
        graph,
        plan,
        batches,
        steps=steps,
        optimizer=optimizer_of(config),
        seed=config.train.seed,
    )
    return "" if found is None else str(found)


def resume_run(
    run: str | Path, overrides: Iterable[str] = (), checkpoint: str | Path | None = None
) -> Result:
    """Goes on with a run in its own folder, from its newest checkpoint or from another one.

    Args:
        run: The run's folder.
        overrides: ``key=value`` texts on top of its ``config.resolved.yaml``.
        checkpoint: Another checkpoint to go on from.

    Raises:
        ConfigError: No run in that folder, or a name or storage path is overridden.
        CheckpointError: It has no good checkpoint.
    """
    folder = Path(run)
    file = folder / "config.resolved.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{str(folder)!r} holds no run that was started from a config: there is no "
            "config.resolved.yaml in it; give the run's folder, such as runs/gpt"
        )
    config = load_config(file, overrides)
    place = folder.absolute()
    if config.run.name != place.name or Path(config.run.storage_path).absolute() != place.parent:
        config = config.resolved(**{"run.name": place.name, "run.storage_path": str(place.parent)})
    if checkpoint is None and checkpoint_at("auto", folder, config.checkpoint.storage) is None:
        raise CheckpointError(
            f"run {str(folder)!r} has no checkpoint to go on from: it ended before it wrote one. "
            f"Start it anew: raypar train {file}; with --set checkpoint.every_steps=100 one is "
            "written every 100 steps"
        )
    return train_config(config, resume=True, checkpoint=checkpoint)


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
