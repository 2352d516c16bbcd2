"""One trial of Ray Tune: a run of raypar on the bundles of the trial's own placement group."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from raypar.errors import CheckpointError, ConfigError
from raypar.mesh.bundles import BundleRange
from raypar.search.config import SearchConfig
from raypar.train.callbacks import Callback, RunFacts
from raypar.train.checkpoint import Checkpoint
from raypar.train.checkpoint.writing import MARK
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.settings import Settings
from raypar.train.trainer import Trainer

TrainerFactory = Callable[[dict[str, Any]], Trainer]
"""Makes the trainer of a trial's configuration."""

_WRITTEN_S = 600.0
_LOOK_S = 0.01
_SCHEMES = {"s3": "s3", "gcs": "gs", "abfs": "abfs", "hdfs": "hdfs"}
"""Filesystem of pyarrow → what fsspec calls it."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What every trial of a sweep does; shipped to the trials.

    Attributes:
        make: Makes the trainer.
        report_every: Steps between reports.
        checkpoints: Whether each report carries a checkpoint.
        use_gpu: Whether a device is a GPU.
        own_bundle: Whether the group's first bundle is the trial's own process.
        plan_cache: Folder of the plans that all trials share; None: the experiment's own.
    """

    make: TrainerFactory
    report_every: int
    checkpoints: bool
    use_gpu: bool
    own_bundle: bool
    plan_cache: str | None

    def __call__(self, config: dict[str, Any]) -> None:
        """Runs the trial, from its checkpoint where Tune has one for it."""
        folder = Path(tune.get_context().get_trial_dir())
        run = folder / "raypar"
        trainer = self.make(dict(config))
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"raypar.tune.trainable: the factory returned {type(trainer).__name__}; it must "
                "return a raypar.Trainer"
            )
        with _resumed(tune.get_checkpoint()) as resume:
            if resume is None or not str(resume).startswith(str(run)):
                # What is left of this trial before it was paused or took over another one.
                shutil.rmtree(run, ignore_errors=True)
            self._fit(trainer, run, resume)

    def _fit(self, trainer: Trainer, run: Path, resume: Path | str | None) -> None:
        settings = trainer.settings
        known = {} if resume is None else Checkpoint(resume).metrics
        reports = Reports(self.report_every, self.checkpoints, run, known)
        trainer.changed(
            lent=self._bundles(),
            scaling=self._scaling(settings),
            search=self._search(settings),
            run=self._run(settings.run, run, reports),
            resume_from=resume or settings.resume_from,
            # The trial's hyper-parameters count, also after it took over another one's weights.
            renew_options=resume is not None,
        ).fit()
        reports.rest()

    def _bundles(self) -> BundleRange:
        from ray.util import get_current_placement_group

        group = get_current_placement_group()
        if group is None:
            raise ConfigError(
                "this trial does not run in a placement group: pass what raypar.tune.trainable "
                "returns to tune.Tuner as it is, without tune.with_resources around it"
            )
        # Ray drops a first bundle that is empty, so devices are counted from the end.
        count = group.bundle_count - int(self.own_bundle)
        return BundleRange.current(f"trial {tune.get_context().get_trial_id()}", count)

    def _scaling(self, settings: Settings) -> ScalingConfig:
        scaling, lent = settings.scaling, self._bundles().count
        if scaling.num_workers not in ("auto", lent):
            raise ConfigError(
                f"the trainer says ScalingConfig(num_workers={scaling.num_workers}), its trial has "
                f"{lent} devices: leave it 'auto', and give trainable(num_workers=...)"
            )
        return dataclasses.replace(scaling, num_workers=lent, use_gpu=self.use_gpu)

    def _search(self, settings: Settings) -> SearchConfig:
        search = settings.search or SearchConfig()
        if isinstance(search.cache, str):
            return search
        return dataclasses.replace(search, cache=self.plan_cache or _shared_folder() or True)

    def _run(self, wanted: RunConfig, run: Path, reports: Reports) -> RunConfig:
        kept = wanted.checkpoint_config
        if self.checkpoints:
            # Tune keeps its own copies: these are only what is on its way to it.
            kept = dataclasses.replace(
                kept, every_steps=self.report_every, every_s=None, at_end=True, num_to_keep=1,
                score_attribute=None, storage=_per_trial(kept.storage),
            )  # fmt: skip
        return dataclasses.replace(
            wanted, name=run.name, storage_path=run.parent, log_every=0, checkpoint_config=kept,
            callbacks=(*wanted.callbacks, reports),
        )  # fmt: skip


class Reports(Callback):
    """Tells Tune of a run.

    Args:
        every: Steps between reports.
        checkpoints: Whether each report waits for the checkpoint of that step, and carries it.
        run: The run's folder.
        known: Metrics of the checkpoint that it goes on from.
    """

    def __init__(self, every: int, checkpoints: bool, run: Path, known: Mapping[str, Any]) -> None:
        self._every = every
        self._checkpoints = checkpoints
        self._run = run
        self._facts: dict[str, Any] = {}
        self._line: dict[str, Any] = {k: v for k, v in known.items() if _is_number(v)}
        self._told = 0  # steps that Tune knows of
        self._reported = False
        self._step = 0

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`."""
        self._step = self._told = run.first_step
        self._line["step"] = run.first_step
        self._facts = {
            "planning_s": run.startup.get("plan", 0.0),
            "plan_cached": _was_cached(self._run / "search.json"),
            "plan_stages": len(run.plan.stages),
            "plan_replicas": run.plan.replicas,
            "num_devices": len(run.plan.devices),
        }

    def on_step(self, line: dict[str, Any]) -> None:
        """See `Callback.on_step`."""
        self._step = int(line["step"]) + 1
        # Tune follows flat names; numbers are all that it can compare.
        self._line.update((k, v) for k, v in line.items() if _is_number(v))
        self._line["step"] = self._step
        if not self._checkpoints and self._step % self._every == 0:
            self._report(None)

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See `Callback.on_evaluation`."""
        self._line.update((k, v) for k, v in line.items() if k.startswith("eval_"))

    def on_checkpoint(self, path: str, step: int) -> None:
        """See `Callback.on_checkpoint`."""
        if self._checkpoints and step > self._told:
            _await_written(path)
            self._step = step
            self._report(tune.Checkpoint(path))

    def rest(self) -> None:
        """Reports the last steps, if they were not.

        A trial that took over a checkpoint of the last step has none to run: it reports what the
        checkpoint knows, as its last result, since Tune would show the other trial's as its own.
        """
        if self._step > self._told:
            self._report(None)
        elif not self._reported:
            self._line["done"] = True
            self._report(None)

    def _report(self, checkpoint: Any) -> None:
        self._told, self._reported = self._step, True
        # Returns once Tune has decided; where it has the trial stop, the thread ends here.
        tune.report({**self._line, **self._facts}, checkpoint=checkpoint)


@contextlib.contextmanager
def _resumed(checkpoint: Any) -> Iterator[Path | str | None]:
    """Where a checkpoint that Tune gives to the trial can be read by all of its ranks."""
    if checkpoint is None:
        yield None
        return
    kind = checkpoint.filesystem.type_name
    if kind == "local":
        yield Path(checkpoint.path)
    elif kind in _SCHEMES:
        yield f"{_SCHEMES[kind]}://{checkpoint.path}"
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _await_written(path: str) -> None:
    """Waits for a checkpoint that was begun: for its index, and until nothing in it changes."""
    end = time.monotonic() + _WRITTEN_S
    while True:
        over = time.monotonic() > end
        try:
            Checkpoint(path)
            if over or "://" in path or not (Path(path) / MARK).exists():
                return
        except CheckpointError:
            if over:
                raise
        time.sleep(_LOOK_S)


def _shared_folder() -> str | None:
    """A folder of the experiment that every node sees, where its storage is one."""
    storage = tune.get_context().get_storage()
    if storage.storage_filesystem.type_name != "local":
        return None
    return str(Path(storage.experiment_fs_path) / ".raypar-plans")


def _per_trial(storage: str | Path | None) -> str | None:
    if storage is None:
        return None
    return f"{str(storage).rstrip('/')}/{tune.get_context().get_trial_id()}"


def _was_cached(record: Path) -> bool:
    try:
        found: Mapping[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any("plan cache (made" in note for note in found.get("notes", ()))
