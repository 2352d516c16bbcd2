"""Figures as files, with what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    """Machine, versions and date, as they stand beside figures."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }


def write_figures(path: Path, figures: Any) -> None:
    """Writes a JSON file as a whole: one that was there stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_suffix(".part")
    spare.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    spare.replace(path)
