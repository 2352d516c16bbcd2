"""Memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes that are in memory now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes that were in memory since `count_peak_anew`, or since it began."""
    return _status("VmHWM")


def count_peak_anew() -> None:
    """Forgets the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
