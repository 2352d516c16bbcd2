"""What a node of a cluster tells of itself, with the standard library alone.

These functions are shipped to the nodes by value, so that they also run on a node that lacks
raypar or has another one: they import nothing of raypar at the top, and answer plain values.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def software() -> dict[str, Any]:
    """Versions that have to be equal on all nodes; None for what is not there. Imports no torch."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "ray": _version("ray"),
        "raypar": _raypar_version(),
        "byteorder": sys.byteorder,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _raypar_version() -> str | None:
    """Of what would be imported: a runtime_env may bring raypar without installing it."""
    try:
        return str(importlib.import_module("raypar._version").__version__)
    except Exception:  # not there, or broken: whatever an import may raise
        return None


def machine() -> dict[str, Any]:
    """Devices, driver, libraries and space of this node."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "gpus": _gpus(),
        "driver": _smi("driver_version")[:1],
        "driver_cuda": _driver_cuda(),
        "torch_cuda": _torch_cuda(),
        "nccl": _nccl(),
        "shm_free": _free("/dev/shm"),
        "source": _source_digest(),
    }


def _gpus() -> list[str]:
    return _smi("name")


def _smi(field: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _driver_cuda() -> list[int] | None:
    """[major, minor] of the newest CUDA that the driver runs, or None without a driver."""
    try:
        found = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return [found.value // 1000, found.value % 1000 // 10]


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, read without importing torch, which takes seconds."""
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except (ImportError, OSError, ValueError):
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.M)
    return found.group(1) if found else None


def _nccl() -> str | None:
    for package in ("nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        found = _version(package)
        if found is not None:
            return found
    return None


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _source_digest() -> str | None:
    """Twelve hex digits of raypar's source: equal version numbers can hide different code."""
    try:
        spec = importlib.util.find_spec("raypar")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class NodeProbe:
    """One actor for each node while a cluster is examined."""

    def __init__(self) -> None:
        self._listeners: list[socket.socket] = []

    def look(self) -> dict[str, Any]:
        """`software` and `machine`."""
        return {**software(), **machine()}

    def now(self) -> float:
        """Seconds of this node's clock."""
        return time.time()

    def open(
        self, ray_address: str, interface: str | None, ports: list[int]
    ) -> tuple[str, list[int], str]:
        """Listens for the other nodes until the actor ends.

        Args:
            ray_address: The address by which Ray knows this node.
            interface: ``comm.interface``.
            ports: Ports to listen on, 0 for any; one that is taken is left out.

        Returns:
            The address, the ports, and what is wrong with them (empty: nothing).
        """
        host = ray_address
        try:
            if interface is not None:
                from raypar.comm.network import NetworkSettings

                host = NetworkSettings(interface).host(ray_address)
        except Exception as error:
            return ray_address, [], str(error)
        problem, opened = "", []
        for port in ports:
            try:
                listener = socket.create_server(
                    (host, port),
                    family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                    reuse_port=False,
                )
            except OSError as error:
                problem = f"cannot listen at {host}:{port}: {error}"
                continue
            self._listeners.append(listener)
            opened.append(int(listener.getsockname()[1]))
            threading.Thread(target=_greet_all, args=(listener,), daemon=True).start()
        return host, opened, problem

    def dial(self, targets: list[tuple[str, int]], timeout_s: float) -> list[str]:
        """What went wrong with connecting to each target, all at once; empty: nothing."""
        found = ["no answer"] * len(targets)

        def one(index: int, target: tuple[str, int]) -> None:
            try:
                with socket.create_connection(target, timeout_s) as sock:
                    sock.settimeout(timeout_s)
                    said = sock.recv(16)
                found[index] = (
                    "" if said == b"raypar" else f"something else listens there: {said!r}"
                )
            except OSError as error:
                found[index] = str(error)

        threads = [
            threading.Thread(target=one, args=(i, t), daemon=True) for i, t in enumerate(targets)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * timeout_s)
        return found


def _greet_all(listener: socket.socket) -> None:
    while True:
        try:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"raypar")
        except OSError:
            return
