"""Stages profiled in this process, on the device that it has."""

from __future__ import annotations

import torch

from raypar.mesh.devices import DEVICES, DeviceKind
from raypar.mesh.local_gpus import gpu_kind
from raypar.search.cost.profiled import profile_job
from raypar.search.cost.stage_job import StageJob
from raypar.search.measure import ProfiledStage

REPEATED_S = 0.3
"""How long the programs of a stage are repeated: the quickest quarter of runs counts."""
_CPU = DEVICES["CPU"]


class LocalProfiler:
    """Profiles stages for devices of this machine's kinds; see `StageProfiler`.

    One device is enough for a plan over thousands of its kind.
    """

    def lacks(self, kind: DeviceKind) -> str:
        """Why stages for such a device cannot be profiled here; empty where they can."""
        if kind == _CPU:
            return ""
        gpu = _gpu()
        if gpu == kind:
            return ""
        here = "a CPU" if gpu is None else f"a CPU and {gpu.name}"
        return f"no {kind.name} is here: this machine has {here}"

    def profile_stage(self, job: StageJob, kind: DeviceKind, device: int) -> ProfiledStage:
        """Runs a stage's programs a few times; see `StageProfiler.profile_stage`."""
        where = torch.device("cuda" if kind.is_gpu else "cpu")
        return profile_job(job, where, budget_s=REPEATED_S)


def _gpu() -> DeviceKind | None:
    """The kind of this process's GPU; None where there is none that the device table knows."""
    return gpu_kind(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
