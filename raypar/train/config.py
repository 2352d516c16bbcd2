"""What a user sets beside the model: how much of the cluster, and where the files go.

Field names are those of Ray Train where it has the same thing.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raypar.errors import ConfigError
from raypar.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How much of the cluster a run takes.

    Attributes:
        num_workers: Devices to use; ``"auto"`` takes as many as the plan names or, without a
            plan, as the cluster has; 0 runs in this process, with threads for ranks and no Ray.
        use_gpu: Whether a device is a GPU; else it is a CPU core.
        cpus_per_worker: CPUs that Ray reserves for each device.
        threads_per_worker: torch threads of each rank; None shares the machine's cores evenly.
        placement_timeout_s: How long to wait for devices that other jobs hold, in seconds.

    Raises:
        ConfigError: A value is out of range.
    """

    num_workers: int | Literal["auto"] = "auto"
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    threads_per_worker: int | None = None
    placement_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        count = self.num_workers
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise ConfigError(
                f"ScalingConfig.num_workers is {count!r}; give 'auto', 0 (one process, no Ray), or "
                "a number of devices, for example 2"
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

    def threads(self, plan: Plan) -> int:
        """Threads of torch on each rank of a plan: as asked for, else an even share of cores."""
        if self.threads_per_worker is not None:
            return self.threads_per_worker
        ranks = len(plan.devices)
        on_node = ranks if self.num_workers == 0 else min(max(plan.cluster), ranks)
        return max(1, (os.cpu_count() or 1) // on_node)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run's files go, and how it is reported.

    Attributes:
        name: The run's folder in `storage_path`; None makes one up from date and time.
        storage_path: Folder of all runs.
        log_every: Without a terminal, one line is printed every so many steps; 0 prints nothing.

    Raises:
        ConfigError: A value is out of range.
    """

    name: str | None = None
    storage_path: str | Path = "runs"
    log_every: int = 10

    def __post_init__(self) -> None:
        name = self.name
        if name is not None and (not name or name in (".", "..") or "/" in name or "\0" in name):
            raise ConfigError(
                f"RunConfig.name is {name!r}; it names a folder, for example 'gpt-small'"
            )
        if self.log_every < 0:
            raise ConfigError(f"RunConfig.log_every is {self.log_every}; give 0 or more")

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
