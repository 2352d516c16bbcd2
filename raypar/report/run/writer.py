"""Has the plan of a run simulated when it starts, and keeps the outcome for its report."""

from __future__ import annotations

import warnings

from raypar.train.callbacks import Callback, RunFacts

PREDICTED_FILE = "predicted.json"


class PredictionWriter(Callback):
    """Writes ``predicted.json`` into the run's folder when it starts, for every attempt anew.

    A prediction that fails is told as a warning: the report then goes without.
    """

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`."""
        # A simulation needs half of the house: not before there is something to simulate.
        from raypar.report.run.predicted import predict

        try:
            target = run.config.get("model", {})
            name = target.get("target", "") if isinstance(target, dict) else ""
            found = predict(run.graph, run.plan, run.cluster, model=str(name))
            (run.folder / PREDICTED_FILE).write_text(found.to_json() + "\n", encoding="utf-8")
        except Exception as error:
            warnings.warn(
                f"no prediction for the report: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
