"""Calibrations on disk: one file for each kind of cluster, found again by its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import tempfile
from functools import lru_cache
from pathlib import Path

from raypar.errors import ClusterError
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.mesh.cluster import Cluster

_LOG = logging.getLogger(__name__)
CACHE_VARIABLE = "RAYPAR_CACHE_DIR"


def cache_dir() -> Path:
    """Where measurements are kept: ``$RAYPAR_CACHE_DIR``, else ``~/.cache/raypar``."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raypar"


def fingerprint(cluster: Cluster) -> str:
    """What a calibration is filed under: hardware and torch, then devices in all and per node.

    Clusters of equal devices, links, torch version and processor share the first part.
    """
    import torch

    rows = sorted(
        {
            json.dumps(
                [dataclasses.asdict(n.device), *map(dataclasses.asdict, (n.inside, n.across))],
                sort_keys=True,
                default=float,
            )
            for n in cluster.nodes
        }
    )
    version = ".".join(torch.__version__.split(".")[:2])
    own = "" if all(n.device.is_gpu for n in cluster.nodes) else _processor()
    text = json.dumps([rows, version, own])
    hardware = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{hardware}-{cluster.n_devices}-{max(cluster.shape)}"


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor's name: the device table knows only CPU cores in general."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Writes a calibration as a whole or not at all; returns where.

    Args:
        calibration: What was measured.
        path: A file of one's own; by default the cache, where `load_calibration` finds it.

    Raises:
        ClusterError: The file cannot be written.
    """
    path = path or cache_dir() / "calibration" / f"{calibration.fingerprint}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(calibration.to_json() + "\n")
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ClusterError(
            f"cannot write the calibration to {str(path)!r}: {error.strerror or error}; set "
            f"{CACHE_VARIABLE} to a folder that can be written, or give --out"
        ) from None
    return path


def read_calibration(path: Path) -> Calibration:
    """Reads one file.

    Raises:
        ClusterError: There is no such file, or it holds no calibration.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read calibration {str(path)!r}: {error}") from None
    try:
        return Calibration.from_json(text)
    except ClusterError as error:
        raise ClusterError(f"calibration file {str(path)!r}: {error}") from None


def load_calibration(cluster: Cluster) -> Calibration:
    """What was measured on this kind of cluster, else the device table.

    Where the cluster itself was not measured, a measurement of the same hardware with other counts
    speaks for it, the nearest in devices per node and in all; its note says so. A file that cannot
    be read is put aside and told.
    """
    wanted = fingerprint(cluster)
    folder = cache_dir() / "calibration"
    exact = _readable(folder / f"{wanted}.json")
    if exact is not None:
        return exact
    hardware, total, per_node = wanted.split("-")

    def distance(path: Path) -> tuple[int, int]:
        _, its_total, its_per_node = path.stem.split("-")
        return abs(int(its_per_node) - int(per_node)), abs(int(its_total) - int(total))

    near = [p for p in sorted(folder.glob(f"{hardware}-*-*.json")) if p.stem.count("-") == 2]
    for path in sorted(near, key=distance):
        found = _readable(path)
        if found is not None:
            note = f"{found.note}; measured with other counts of devices"
            return dataclasses.replace(found, note=note)
    return table_calibration(cluster)


def _readable(path: Path) -> Calibration | None:
    if not path.exists():
        return None
    try:
        return read_calibration(path)
    except ClusterError as error:
        aside = path.with_suffix(".corrupt")
        try:
            os.replace(path, aside)
            _LOG.warning("%s; kept aside as %s, run `raypar probe` again", error, aside.name)
        except OSError:
            _LOG.warning("%s; run `raypar probe` again", error)
        return None
