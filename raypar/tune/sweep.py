"""Ray Tune's door: a trainable out of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypar.config import Config, load_config
from raypar.errors import ConfigError
from raypar.train.trainer import Trainer


def trainable(
    make: Config | str | Path | Callable[[dict[str, Any]], Trainer],
    *,
    num_workers: int | Callable[[dict[str, Any]], int],
    report_every: int = 10,
    checkpoints: bool = True,
    use_gpu: bool = False,
    cpus_per_worker: float = 1.0,
    trial_cpus: float = 0.0,
    strategy: str = "PACK",
    plan_cache: str | Path | None = None,
) -> Callable[[dict[str, Any]], None]:
    """What `ray.tune.Tuner` takes: each trial trains with raypar on the trial's own devices.

    A trial is one placement group of Tune's: a bundle for every device, after one for the trial's
    own process. Every mesh of the trial's plan is a named range of these bundles; no other group
    is made, so that all is free at once when Tune stops the trial.

    Each report holds the numbers of the last step (``loss``, ``samples_per_s``, ...), of the last
    evaluation (``eval_*``), ``step`` (steps done), and ``planning_s``, ``plan_cached``,
    ``plan_stages``, ``plan_replicas``, ``num_devices``. A trial that was paused, that failed, or
    that takes over another one's checkpoint (population-based training) goes on from the
    checkpoint, under its own plan and with the optimizer options of its own configuration.

    Plans are shared: of trials that ask for the same one, the first searches, the others wait for
    it. Searches do not measure plans, since that takes placement groups of its own.

    Args:
        make: Makes the trainer from a trial's configuration; or a configuration of a run, or the
            path of one: then the trial's configuration has its dotted keys
            (``{"optimizer.kwargs.lr": tune.loguniform(1e-4, 1e-2)}``), in place of it.
        num_workers: Devices of a trial; or a function of the trial's configuration.
        report_every: Steps between reports.
        checkpoints: Whether each report carries a checkpoint; without, a trial can be neither
            paused nor cloned.
        use_gpu: Whether a device is a GPU, else a CPU core.
        cpus_per_worker: CPUs that go with each device.
        trial_cpus: CPUs of the trial's own process, which starts the run and reads the reports.
        strategy: Of the placement groups.
        plan_cache: Folder of plans that all nodes see; default: in the experiment's storage, where
            that is a folder, else each machine's own.

    Returns:
        The trainable, with its resources; ask for no others (``tune.with_resources``).

    Raises:
        ConfigError: `ray.tune` is missing, or a value is out of range.
    """
    try:
        from ray import tune
    except ImportError as error:
        raise ConfigError(
            f"raypar.tune.trainable needs Ray Tune, which cannot be imported: {error}; "
            "pip install 'raypar[tune]'"
        ) from None
    from raypar.tune._trials import Trial

    if report_every < 1:
        raise ConfigError(f"report_every is {report_every!r}; give a number of steps, at least 1")
    if isinstance(num_workers, int):
        _check_count(num_workers)
    trial = Trial(
        make=make if callable(make) else Configured(_loaded(make)),
        report_every=report_every,
        checkpoints=checkpoints,
        use_gpu=use_gpu,
        own_bundle=trial_cpus > 0,
        plan_cache=None if plan_cache is None else str(Path(plan_cache).absolute()),
    )

    def resources(config: dict[str, Any]) -> Any:
        count = num_workers(config) if callable(num_workers) else num_workers
        _check_count(count)
        own = {"CPU": trial_cpus} if trial_cpus else {}
        each = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        return tune.PlacementGroupFactory([own, *([each] * count)], strategy=strategy)

    def raypar_trial(config: dict[str, Any]) -> None:
        trial(config)

    wanted: Any = resources if callable(num_workers) else resources({})
    found: Callable[[dict[str, Any]], None] = tune.with_resources(raypar_trial, wanted)
    return found


@dataclass(frozen=True)
class Configured:
    """Makes trainers of a configuration, with a trial's values in place of its own."""

    config: Config

    def __call__(self, values: dict[str, Any]) -> Trainer:
        """The trainer of a trial.

        Raises:
            ConfigError: A key does not exist, or a value does not fit it.
        """
        from raypar._launch import trainer_of

        return trainer_of(self.config.resolved(**values))


def _loaded(config: Config | str | Path) -> Config:
    return config if isinstance(config, Config) else load_config(config)


def _check_count(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(
            f"num_workers is {count!r}; a trial has a number of devices, at least 1, for example 2"
        )
