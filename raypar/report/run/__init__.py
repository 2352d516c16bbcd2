"""A run that is over, or still goes on, as one offline HTML page: `write_report`.

`writer.py` puts away what the plan promises when the run starts (`predicted.py`), `measured.py`
reads what ranks told of themselves, `files.py` reads the run's folder, `document.py` puts the page
together, `trace.py` writes the same for Perfetto. The other files are one picture each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypar.report.run.document import run_page, write_report
    from raypar.report.run.trace import write_run_trace
    from raypar.report.run.writer import PredictionWriter

__all__ = ["PredictionWriter", "run_page", "write_report", "write_run_trace"]

_HOMES = {
    "PredictionWriter": "writer",
    "run_page": "document",
    "write_report": "document",
    "write_run_trace": "trace",
}


def __getattr__(name: str) -> Any:
    """Imported at first use: a run that starts needs the writer only."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
