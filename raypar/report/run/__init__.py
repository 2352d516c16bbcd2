"""A run that is over, or still goes on, as one offline HTML page: `write_report`.

`writer.py` puts away what the plan promises when the run starts (`predicted.py`), `measured.py`
reads what ranks told of themselves, `files.py` reads the run's folder, `document.py` puts the page
together, `trace.py` writes the same for Perfetto. The other files are one picture each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypar._lazy import lazy

if TYPE_CHECKING:
    from raypar.report.run.document import run_page, write_report
    from raypar.report.run.trace import write_run_trace
    from raypar.report.run.writer import PredictionWriter

__all__ = ["PredictionWriter", "run_page", "write_report", "write_run_trace"]

# A run that starts needs the writer only.
__getattr__ = lazy(
    __name__,
    {
        "PredictionWriter": "raypar.report.run.writer",
        "run_page": "raypar.report.run.document",
        "write_report": "raypar.report.run.document",
        "write_run_trace": "raypar.report.run.trace",
    },
)
