"""Packages of this interpreter: their versions, and whether they go with each other."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_torch() -> list[Finding]:
    """torch: its version and what it was built for."""
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
    mend = f"{pip_line()} 'torch>={low},<{high}'"
    if version is None:
        return Finding("torch", FAIL, "not installed", mend)
    if not _TORCH_RANGE[0] <= _numbers(version)[:2] < _TORCH_RANGE[1]:
        return Finding("torch", FAIL, f"{version}; raypar needs >={low},<{high}", mend)
    return Finding("torch", OK, version)


def torch_cuda() -> str | None:
    """The CUDA that torch was built for; None without one, or without torch."""
    try:
        import torch
    except Exception:
        return None
    cuda: str | None = torch.version.cuda
    return cuda


def check_cupy() -> list[Finding]:
    """cupy: the one package that goes with torch's CUDA."""
    names = sorted(
        {
            d.metadata["Name"]
            for d in metadata.distributions()
            if (d.metadata["Name"] or "").lower().startswith("cupy")
        }
    )
    installed = {name.lower(): _version(name) or "?" for name in names}
    return [cupy_finding(installed, torch_cuda(), bool(gpus_of_driver()))]


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
            f"{pip_line()} 'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/cu128",
        )
    wrong = [name for name in installed if name != wanted]
    if wrong:
        # Two cupy packages write into the same folder: both have to go first.
        remove = f"{pip_line('uninstall')} -y {' '.join(installed)}"
        return Finding(
            "cupy",
            bad,
            f"{shown}; torch is built for CUDA {cuda}, which goes with {wanted} alone",
            f"{remove} && {pip_line()} {wanted}",
        )
    if not installed and not gpu:
        return Finding("cupy", OK, f"not installed (no GPU here; on one: {pip_line()} {wanted})")
    if not installed:
        return Finding(
            "cupy",
            FAIL,
            f"not installed; GPU transfers need {wanted} (torch is built for CUDA {cuda})",
            f"{pip_line()} 'raypar[cuda{major}]'",
        )
    return Finding("cupy", OK, f"{shown}, fits torch's CUDA {cuda}")


def check_nccl() -> list[Finding]:
    """NCCL: the library that cupy loads."""
    return [nccl_finding(_nccl_libraries(), torch_cuda(), bool(gpus_of_driver()))]


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
            f"{pip_line()} {wanted}",
        )
    return Finding("NCCL", OK, shown)


def check_ray() -> list[Finding]:
    """Ray: its version and its extra."""
    return [ray_finding(_version("ray"), _version("aiohttp") is not None)]


def ray_finding(version: str | None, default_extra: bool = True) -> Finding:
    """Judges a Ray version (None: not installed), and whether its extra ``default`` is there."""
    low, high = (".".join(map(str, v)) for v in _RAY_RANGE)
    mend = f"{pip_line()} 'ray[default]>={low},<{high}'"
    if version is None:
        return Finding("Ray", FAIL, "not installed", mend)
    if not _RAY_RANGE[0] <= _numbers(version) < _RAY_RANGE[1]:
        return Finding("Ray", FAIL, f"{version}; raypar needs >={low},<{high}", mend)
    if not default_extra:
        found = f"{version} without its extra 'default' (dashboard, state API)"
        return Finding("Ray", WARN, found, f"{pip_line()} 'ray[default]=={version}'")
    return Finding("Ray", OK, version)


def check_core() -> list[Finding]:
    """What raypar needs besides."""
    missing = [name for name in _CORE if _version(name) is None]
    if missing:
        return [
            Finding(
                "core packages",
                FAIL,
                f"missing: {', '.join(missing)}",
                f"{pip_line()} {' '.join(missing)}",
            )
        ]
    return [Finding("core packages", OK, ", ".join(f"{n} {_version(n)}" for n in _CORE))]


def check_extras() -> list[Finding]:
    """What raypar's own extras bring."""
    found = []
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        if missing:
            text = f"not installed (missing {', '.join(missing)}); optional"
            found.append(Finding(f"extra {extra}", OK, f"{text}: {pip_line()} 'raypar[{extra}]'"))
        else:
            shown = ", ".join(f"{n} {_version(n)}" for n in packages)
            found.append(Finding(f"extra {extra}", OK, shown))
    return found


def pip_line(verb: str = "install") -> str:
    """The pip line of this interpreter, so that it cannot mend another environment."""
    python = sys.executable or "python"
    return f"{python} -m pip {verb}"


def gpus_of_driver() -> list[str]:
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
