"""A run that is over, or still goes on, as one offline HTML page: `write_report`.

`predicted.py` writes what the plan promised when the run starts, `measured.py` reads what ranks
told of themselves, `files.py` reads the run's folder, `document.py` puts the page together. The
other files are one picture each.
"""

from raypar.report.run.document import run_page, write_report
from raypar.report.run.predicted import PredictionWriter
from raypar.report.run.trace import write_run_trace

__all__ = ["PredictionWriter", "run_page", "write_report", "write_run_trace"]
