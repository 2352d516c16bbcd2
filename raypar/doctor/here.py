"""This machine: what is installed, whether it fits together, and how to mend it.

Uses the standard library as far as it can, so that it works where raypar itself does not: every
check is run behind a guard, and none of them raises. Those of packages are in `packages.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from raypar.doctor.finding import FAIL, OK, WARN, Finding
from raypar.doctor.packages import (
    check_core,
    check_cupy,
    check_extras,
    check_nccl,
    check_ray,
    check_torch,
    gpus_of_driver,
    pip_line,
    torch_cuda,
)

_GIB = 2**30
_LONGEST_TEMP = 45
_RAY_PROBE_S = 1.5


def diagnose() -> list[Finding]:
    """Runs every check; never raises, and does not wait long for an unreachable cluster."""
    findings: list[Finding] = []
    for name, check in _CHECKS:
        try:
            findings.extend(check())
        except Exception as error:  # a broken installation may raise anything, also on import
            findings.append(
                Finding(name, WARN, f"could not be looked at: {type(error).__name__}: {error}")
            )
    return findings


# -- Python and the operating system ---------------------------------------------------------


def _python() -> list[Finding]:
    return [python_finding(sys.version_info[:3], sys.executable)]


def python_finding(version: tuple[int, ...], executable: str = "python") -> Finding:
    """Judges a Python version."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(
            "Python",
            FAIL,
            f"{found} ({executable}); raypar needs 3.11 or newer",
            "python3.11 -m venv .venv && .venv/bin/pip install raypar",
        )
    return Finding("Python", OK, f"{found} ({executable})")


def _system() -> list[Finding]:
    return [system_finding(sys.platform, platform.machine())]


def system_finding(system: str, machine: str) -> Finding:
    """Judges an operating system (`sys.platform`) and processor (`platform.machine()`)."""
    if system.startswith("linux"):
        return Finding("system", OK, f"Linux on {machine}")
    if system == "darwin" and machine == "arm64":
        return Finding("system", OK, "macOS on Apple silicon (CPU devices)")
    return Finding(
        "system",
        FAIL,
        f"{system} on {machine}",
        "raypar runs on Linux and on Apple-silicon macOS; use one of them, or WSL 2 on Windows",
    )


# -- the machine -----------------------------------------------------------------------------


def _devices() -> list[Finding]:
    from raypar.mesh._memory import machine_memory

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = machine_memory()
    status, mend = OK, ""
    if memory < 4 * _GIB:
        status, mend = WARN, "give the machine or container at least 4 GiB (make demo needs that)"
    findings = [
        Finding("CPU", OK, f"{cores} cores"),
        Finding("memory", status, f"{memory / _GIB:.1f} GiB", mend),
    ]
    return [*findings, _gpus()]


def _gpus() -> Finding:
    driver = gpus_of_driver()
    if torch_cuda() is None:
        if driver:
            return Finding(
                "GPU",
                WARN,
                f"{'; '.join(driver)}; but torch is built without CUDA",
                f"{pip_line()} --force-reinstall 'torch>=2.11,<2.14' "
                "--index-url https://download.pytorch.org/whl/cu128",
            )
        return Finding("GPU", OK, "none (CPU devices are used)")
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        if driver:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            mend = (
                "unset CUDA_VISIBLE_DEVICES"
                if visible is not None
                else "update the NVIDIA driver to one that supports CUDA " + str(torch_cuda())
            )
            return Finding("GPU", FAIL, f"{'; '.join(driver)}; but torch sees none", mend)
        return Finding("GPU", OK, "none (CPU devices are used)")
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    return Finding(
        "GPU", OK, "; ".join(f"{p.name} ({p.total_memory / _GIB:.0f} GiB)" for p in names)
    )


def _disk() -> list[Finding]:
    temp = tempfile.gettempdir()
    findings = [
        space_finding(
            "free disk (.)", shutil.disk_usage(".").free, 2 * _GIB, "free some disk space"
        ),
        space_finding(
            f"free disk ({temp})",
            shutil.disk_usage(temp).free,
            _GIB,
            "set TMPDIR to a short path with more space",
        ),
        temp_finding(temp),
    ]
    if Path("/dev/shm").is_dir():
        mend = "start the container with --shm-size=2g or more (Ray's objects live there)"
        free = shutil.disk_usage("/dev/shm").free
        findings.append(space_finding("/dev/shm", free, _GIB, mend))
    return findings


def space_finding(name: str, free: int, enough: int, mend: str) -> Finding:
    """Judges free bytes against what is enough."""
    found = f"{free / _GIB:.1f} GiB free"
    if free < enough:
        return Finding(name, WARN, f"{found}, less than {enough / _GIB:.0f} GiB", mend)
    return Finding(name, OK, found)


def temp_finding(path: str) -> Finding:
    """Judges the length of the folder for temporary files: Ray puts sockets below it."""
    if len(path) > _LONGEST_TEMP:
        return Finding(
            "temp path",
            WARN,
            f"{path} has {len(path)} characters; Ray's socket names fit up to {_LONGEST_TEMP}",
            "export TMPDIR=/tmp",
        )
    return Finding("temp path", OK, path)


# -- the Ray cluster -------------------------------------------------------------------------


_RAY_MEND = "unset RAY_ADDRESS (to use this machine), or start the head: ray start --head"


def _cluster() -> list[Finding]:
    from raypar.errors import ClusterError
    from raypar.mesh._probe import probe

    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        said = f"RAY_ADDRESS={address}" if address else "RAY_ADDRESS is not set"
        found = f"{said}: a run starts a Ray of its own on this machine"
        return [Finding("Ray cluster", OK, found)]
    if address == "auto":
        from raypar.compat_ray import ray_address_on_this_machine

        here = ray_address_on_this_machine()
        if here is None:
            found = "RAY_ADDRESS=auto, and no Ray was started on this machine"
            return [Finding("Ray cluster", FAIL, found, _RAY_MEND)]
        address = here
    try:
        probe(address, _RAY_PROBE_S)
    except ClusterError as error:
        return [Finding("Ray cluster", FAIL, str(error), _RAY_MEND)]
    return [Finding("Ray cluster", OK, f"a Ray head answers at {address}")]


_CHECKS: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("Python", _python),
    ("system", _system),
    ("torch", check_torch),
    ("cupy", check_cupy),
    ("NCCL", check_nccl),
    ("Ray", check_ray),
    ("core packages", check_core),
    ("extras", check_extras),
    ("devices", _devices),
    ("disk", _disk),
    ("Ray cluster", _cluster),
)
