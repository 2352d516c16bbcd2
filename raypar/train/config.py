"""What a user sets beside the model: how much of the cluster, and where the files go.

Field names are those of Ray Train where it has the same thing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raypar.errors import ConfigError
from raypar.plan import Plan
from raypar.train._kinds import NONE, NUMBER, check_kinds
from raypar.train.callbacks import Callback

_SCALING = {
    "cpus_per_worker": (NUMBER, "a number above 0, for example 1"),
    "threads_per_worker": ((int, NONE), "a number of at least 1, or None"),
    "placement_timeout_s": (NUMBER, "seconds above 0, for example 60"),
    "scale_up_timeout_s": (NUMBER, "seconds above 0, for example 180"),
    "start_timeout_s": ((NUMBER, NONE), "seconds above 0, for example 900, or None"),
}
_CHECKPOINT = {
    "storage": ((str, Path, NONE), "a folder, an fsspec URL, or None"),
    "every_s": ((NUMBER, NONE), "seconds above 0, for example 600, or None"),
    "score_attribute": ((str, NONE), "the name of a metric, for example 'eval_loss', or None"),
}
_RUN = {
    "name": ((str, NONE), "the name of a folder, for example 'gpt-small', or None"),
    "storage_path": ((str, Path), "a local folder, for example 'runs'"),
    "log_every": (int, "steps, 0 or more"),
}
"""Field → what it may be, and the same in words."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How much of the cluster a run takes.

    Attributes:
        num_workers: Devices to use; ``"auto"`` takes as many as the plan names or, without a
            plan, as the cluster has; 0 runs in this process, with threads for ranks and no Ray;
            ``(least, most)`` asks the autoscaler for the most, waits `scale_up_timeout_s`, and
            takes what is there, if it is at least the least.
        use_gpu: Whether a device is a GPU; else it is a CPU core.
        cpus_per_worker: CPUs that Ray reserves for each device.
        threads_per_worker: torch threads of each rank; None shares the machine's cores evenly.
        placement_timeout_s: How long to wait for devices that other jobs hold, in seconds.
        scale_up_timeout_s: How long to wait for the autoscaler's nodes, and after a failure for
            devices to start again on, in seconds.
        start_timeout_s: How long ranks may take to build their parts of the model, and compile
            them, in seconds; None: 300, or 1800 where they are compiled.

    Raises:
        ConfigError: A value is out of range.
    """

    num_workers: int | Literal["auto"] | tuple[int, int] = "auto"
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    threads_per_worker: int | None = None
    placement_timeout_s: float = 30.0
    scale_up_timeout_s: float = 180.0
    start_timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_kinds("ScalingConfig.", self, _SCALING)
        count = self.num_workers
        if isinstance(count, list):  # from YAML and JSON
            count = tuple(count)
            object.__setattr__(self, "num_workers", count)
        if isinstance(count, tuple):
            if len(count) != 2 or not all(_is_count(n) for n in count) or count[0] > count[1]:
                raise ConfigError(
                    f"ScalingConfig.num_workers is {count!r}; a range is (least, most) with "
                    "1 <= least <= most, for example (2, 8)"
                )
        elif count != "auto" and count != 0 and not _is_count(count):
            raise ConfigError(
                f"ScalingConfig.num_workers is {count!r}; give 'auto', 0 (one process, no Ray), a "
                "number of devices, for example 2, or a range, for example (2, 8)"
            )
        for name in ("placement_timeout_s", "scale_up_timeout_s", "start_timeout_s"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(
                    f"ScalingConfig.{name} is {seconds!r}; it must be above 0 seconds, for example "
                    "60"
                )
        if self.cpus_per_worker <= 0:
            raise ConfigError(
                f"ScalingConfig.cpus_per_worker is {self.cpus_per_worker!r}; it must be above 0, "
                "for example 1"
            )
        threads = self.threads_per_worker
        if threads is not None and threads < 1:
            raise ConfigError(
                f"ScalingConfig.threads_per_worker is {threads!r}; it must be at least 1, or None"
            )
        if self.use_gpu and count == 0:
            raise ConfigError(
                "ScalingConfig(num_workers=0, use_gpu=True): the in-process backend runs on CPU "
                "tensors only; set num_workers=1 or more for GPUs"
            )

    @property
    def in_process(self) -> bool:
        """Whether the run stays in this process, without Ray."""
        return self.num_workers == 0

    @property
    def most(self) -> int | None:
        """The most devices that it may take, or None without a limit."""
        count = self.num_workers
        return count[1] if isinstance(count, tuple) else None if count == "auto" else count

    def threads(self, plan: Plan) -> int:
        """Threads of torch on each rank of a plan: as asked for, else an even share of cores."""
        if self.threads_per_worker is not None:
            return self.threads_per_worker
        ranks = len(plan.devices)
        on_node = ranks if self.in_process else min(max(plan.cluster), ranks)
        return max(1, (os.cpu_count() or 1) // on_node)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept.

    Attributes:
        storage: Folder, or fsspec URL, that this process and all ranks can write to; None: folder
            ``checkpoints`` in the run's folder.
        every_steps: One each time so many optimizer steps are done; None: not by steps.
        every_s: One each time so many seconds have passed; None: not by time.
        at_end: One at the end of the run, also of one that is stopped (Ctrl-C, SIGTERM, a limit).
        num_to_keep: How many are kept; None keeps all. The newest is always kept.
        score_attribute: Metric whose best checkpoints are kept, such as ``eval_loss`` or ``loss``;
            None keeps the newest.
        score_order: Whether ``"min"`` or ``"max"`` of it is best.

    Raises:
        ConfigError: A value is out of range.
    """

    storage: str | Path | None = None
    every_steps: int | None = None
    every_s: float | None = None
    at_end: bool = True
    num_to_keep: int | None = 2
    score_attribute: str | None = None
    score_order: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        check_kinds("CheckpointConfig.", self, _CHECKPOINT)
        for name in ("every_steps", "num_to_keep"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ConfigError(
                    f"CheckpointConfig.{name} is {value!r}; give a number of at least 1, or None"
                )
        if self.every_s is not None and not self.every_s > 0:
            raise ConfigError(
                f"CheckpointConfig.every_s is {self.every_s!r}; give seconds above 0, or None"
            )
        if self.score_order not in ("min", "max"):
            raise ConfigError(
                f"CheckpointConfig.score_order is {self.score_order!r}; give 'min' or 'max'"
            )


@dataclass(frozen=True, kw_only=True)
class FailureConfig:
    """What happens when an actor or node is lost.

    Attributes:
        max_failures: How often the run is started again from its newest checkpoint, on the devices
            that are left; -1: without limit. Errors of the model, the data or the configuration,
            and losses that are not finite, would come again and end the run at once.

    Raises:
        ConfigError: A value is out of range.
    """

    max_failures: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.max_failures, int) or self.max_failures < -1:
            raise ConfigError(
                f"FailureConfig.max_failures is {self.max_failures!r}; give 0 or more, or -1 for "
                "no limit"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run's files go, and how it is reported.

    Attributes:
        name: The run's folder in `storage_path`; None makes one up from date and time.
        storage_path: Folder of all runs.
        log_every: Without a terminal, one line is printed every so many steps; 0 prints nothing.
        checkpoint_config: When checkpoints are written.
        failure_config: What happens when an actor or node is lost.
        callbacks: Told of the run while it goes on (`raypar.Callback`). A config has the loggers
            among them, by name (``run.loggers``); others are objects of a program.

    Raises:
        ConfigError: A value is out of range.
    """

    name: str | None = None
    storage_path: str | Path = "runs"
    log_every: int = 10
    checkpoint_config: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure_config: FailureConfig = field(default_factory=FailureConfig)
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        check_kinds("RunConfig.", self, _RUN)
        name = self.name
        if name is not None and (not name or name in (".", "..") or "/" in name or "\0" in name):
            raise ConfigError(
                f"RunConfig.name is {name!r}; it names a folder, for example 'gpt-small'"
            )
        if self.log_every < 0:
            raise ConfigError(f"RunConfig.log_every is {self.log_every}; give 0 or more")
        if "://" in str(self.storage_path):
            raise ConfigError(
                f"RunConfig.storage_path is {str(self.storage_path)!r}; a run's own files (metrics,"
                " plan, events) lie in a local folder, for example 'runs'. Its checkpoints may lie "
                f"at a URL: CheckpointConfig(storage={str(self.storage_path)!r}) "
                "(checkpoint.storage)"
            )
        told: object = self.callbacks
        if not isinstance(told, Sequence) or not all(isinstance(c, Callback) for c in told):
            raise ConfigError(
                f"RunConfig.callbacks is {told!r}; give a list of objects of classes that derive "
                "from raypar.Callback, for example [MyCallback()]"
            )

    def folder(self) -> Path:
        """Makes the run's folder and returns its path.

        Raises:
            ConfigError: It cannot be made or written.
        """
        name = self.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        path = Path(self.storage_path) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"RunConfig: cannot write to {str(path)!r}: {error.strerror}; set storage_path to "
                "a folder of yours"
            ) from None
        return path
