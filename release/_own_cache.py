"""A cache folder of a measurement's own: what searches before it learned is out of sight."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import CACHE_VARIABLE, save_calibration


@contextmanager
def own_cache(calibration: Calibration | None = None) -> Iterator[None]:
    """Inside, the cache is empty but for `calibration`."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="raypar-cache-") as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            if calibration is not None:
                save_calibration(calibration)
            yield
        finally:
            os.environ.pop(CACHE_VARIABLE)
            if before is not None:
                os.environ[CACHE_VARIABLE] = before
