"""This machine: what is installed, whether it fits together, and how to mend it.

Uses the standard library as far as it can, so that it works where raypar itself does not: every
check is run behind a guard, and none of them raises.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from raypar.doctor.finding import FAIL, OK, WARN, Finding

_TORCH_RANGE = ((2, 11), (2, 14))
_RAY_RANGE = ((2, 60), (3,))
_CUPY = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}
_CORE = ("numpy", "networkx", "optuna", "pydantic", "click", "rich", "highspy", "pyyaml", "jinja2")
_EXTRAS = {
    "tune": ("pandas", "pyarrow", "tensorboardX"),
    "viz": ("matplotlib",),
    "hf": ("transformers",),
}
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


# -- packages --------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _torch() -> list[Finding]:
    version = _version("torch")
    finding = torch_finding(version)
    if version is None:
        return [finding]
    import torch  # that it imports at all is a finding of its own

    cuda = torch.version.cuda
    build = f"CUDA {cuda}" if cuda else "no CUDA"
    return [Finding(finding.name, finding.status, f"{finding.found}, {build}", finding.mend)]


def torch_finding(version: str | None) -> Finding:
    """Judges a torch version (None: not installed)."""
    low, high = (".".join(map(str, v)) for v in _TORCH_RANGE)
    mend = f"{_pip()} 'torch>={low},<{high}'"
    if version is None:
        return Finding("torch", FAIL, "not installed", mend)
    if not _TORCH_RANGE[0] <= _numbers(version)[:2] < _TORCH_RANGE[1]:
        return Finding("torch", FAIL, f"{version}; raypar needs >={low},<{high}", mend)
    return Finding("torch", OK, version)


def _torch_cuda() -> str | None:
    try:
        import torch
    except Exception:
        return None
    cuda: str | None = torch.version.cuda
    return cuda


def _cupy() -> list[Finding]:
    names = sorted(
        {
            d.metadata["Name"]
            for d in metadata.distributions()
            if (d.metadata["Name"] or "").lower().startswith("cupy")
        }
    )
    installed = {name.lower(): _version(name) or "?" for name in names}
    return [cupy_finding(installed, _torch_cuda(), bool(_nvidia_smi()))]


def cupy_finding(installed: dict[str, str], cuda: str | None, gpu: bool = True) -> Finding:
    """Judges the installed cupy packages (name → version) against torch's CUDA version.

    Where the machine has no `gpu`, nothing about cupy is a failure: torch's usual Linux build has
    CUDA on machines without a GPU too.
    """
    bad = FAIL if gpu else WARN
    shown = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    if cuda is None:
        return Finding("cupy", OK, f"{shown} (not needed: torch is built without CUDA)")
    major = _numbers(cuda)[0]
    wanted = _CUPY.get(major)
    if wanted is None:
        return Finding(
            "cupy",
            bad,
            f"{shown}; torch is built for CUDA {cuda}, and raypar knows CUDA 12 and 13",
            f"{_pip()} 'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/cu128",
        )
    wrong = [name for name in installed if name != wanted]
    if wrong:
        # Two cupy packages write into the same folder: both have to go first.
        remove = f"{_pip('uninstall')} -y {' '.join(installed)}"
        return Finding(
            "cupy",
            bad,
            f"{shown}; torch is built for CUDA {cuda}, which goes with {wanted} alone",
            f"{remove} && {_pip()} {wanted}",
        )
    if not installed and not gpu:
        return Finding("cupy", OK, f"not installed (no GPU here; on one: {_pip()} {wanted})")
    if not installed:
        return Finding(
            "cupy",
            FAIL,
            f"not installed; GPU transfers need {wanted} (torch is built for CUDA {cuda})",
            f"{_pip()} 'raypar[cuda{major}]'",
        )
    return Finding("cupy", OK, f"{shown}, fits torch's CUDA {cuda}")


def _nccl() -> list[Finding]:
    return [nccl_finding(_nccl_libraries(), _torch_cuda(), bool(_nvidia_smi()))]


def _nccl_libraries() -> dict[str, str]:
    """NCCL that pip installed: package → version as the library itself tells, else pip's."""
    found: dict[str, str] = {}
    for package in ("nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        version = _version(package)
        if version is not None:
            found[package] = _loaded_nccl() or version
    return found


def _loaded_nccl() -> str | None:
    """The version that libnccl.so.2 reports, or None where it cannot be loaded."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
        folders = list(spec.submodule_search_locations or []) if spec else []
        library = ctypes.CDLL(str(Path(folders[0], "lib", "libnccl.so.2")))
        code = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(code)) != 0:
            return None
    except (ImportError, OSError, IndexError, AttributeError):
        return None
    major, rest = divmod(code.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def nccl_finding(libraries: dict[str, str], cuda: str | None, gpu: bool = True) -> Finding:
    """Judges the NCCL packages (name → version) against torch's CUDA version."""
    shown = ", ".join(f"{name} {version}" for name, version in libraries.items())
    if cuda is None:
        return Finding("NCCL", OK, f"{shown or 'none'} (not needed: torch is built without CUDA)")
    wanted = f"nvidia-nccl-cu{_numbers(cuda)[0]}"
    if wanted not in libraries:
        return Finding(
            "NCCL",
            FAIL if gpu else WARN,
            f"{shown or 'none'}; torch is built for CUDA {cuda}, and cupy loads {wanted}",
            f"{_pip()} {wanted}",
        )
    return Finding("NCCL", OK, shown)


def _ray_package() -> list[Finding]:
    return [ray_finding(_version("ray"), _version("aiohttp") is not None)]


def ray_finding(version: str | None, default_extra: bool = True) -> Finding:
    """Judges a Ray version (None: not installed), and whether its extra ``default`` is there."""
    low, high = (".".join(map(str, v)) for v in _RAY_RANGE)
    mend = f"{_pip()} 'ray[default]>={low},<{high}'"
    if version is None:
        return Finding("Ray", FAIL, "not installed", mend)
    if not _RAY_RANGE[0] <= _numbers(version) < _RAY_RANGE[1]:
        return Finding("Ray", FAIL, f"{version}; raypar needs >={low},<{high}", mend)
    if not default_extra:
        found = f"{version} without its extra 'default' (dashboard, state API)"
        return Finding("Ray", WARN, found, f"{_pip()} 'ray[default]=={version}'")
    return Finding("Ray", OK, version)


def _core_packages() -> list[Finding]:
    missing = [name for name in _CORE if _version(name) is None]
    if missing:
        return [
            Finding(
                "core packages",
                FAIL,
                f"missing: {', '.join(missing)}",
                f"{_pip()} {' '.join(missing)}",
            )
        ]
    return [Finding("core packages", OK, ", ".join(f"{n} {_version(n)}" for n in _CORE))]


def _extras() -> list[Finding]:
    found = []
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        if missing:
            text = f"not installed (missing {', '.join(missing)}); optional"
            found.append(Finding(f"extra {extra}", OK, f"{text}: {_pip()} 'raypar[{extra}]'"))
        else:
            shown = ", ".join(f"{n} {_version(n)}" for n in packages)
            found.append(Finding(f"extra {extra}", OK, shown))
    return found


def _pip(verb: str = "install") -> str:
    """The pip line of this interpreter, so that it cannot mend another environment."""
    python = sys.executable or "python"
    return f"{python} -m pip {verb}"


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
    driver = _nvidia_smi()
    if _torch_cuda() is None:
        if driver:
            return Finding(
                "GPU",
                WARN,
                f"{'; '.join(driver)}; but torch is built without CUDA",
                f"{_pip()} --force-reinstall 'torch>=2.11,<2.14' "
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
                else "update the NVIDIA driver to one that supports CUDA " + str(_torch_cuda())
            )
            return Finding("GPU", FAIL, f"{'; '.join(driver)}; but torch sees none", mend)
        return Finding("GPU", OK, "none (CPU devices are used)")
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    return Finding(
        "GPU", OK, "; ".join(f"{p.name} ({p.total_memory / _GIB:.0f} GiB)" for p in names)
    )


def _nvidia_smi() -> list[str]:
    """Names of the GPUs that the driver knows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=2,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


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
        from raypar.compat import ray_address_on_this_machine

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
    ("torch", _torch),
    ("cupy", _cupy),
    ("NCCL", _nccl),
    ("Ray", _ray_package),
    ("core packages", _core_packages),
    ("extras", _extras),
    ("devices", _devices),
    ("disk", _disk),
    ("Ray cluster", _cluster),
)
