"""MLflow: a run at ``MLFLOW_TRACKING_URI``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from raypar.train.callbacks import RunFacts
from raypar.train.dashboards.table import scalars
from raypar.train.loggers.base import Logger, imported

_ID_FILE = "mlflow.id"
_BATCH, _FLUSH_S = 900, 2.0
_LONGEST = 500


class MLflowLogger(Logger):
    """Logs metrics in batches, the configuration as parameters, events as tags.

    Where to is MLflow's own business (``MLFLOW_TRACKING_URI``, credentials); MLflow's notion of an
    active run is left alone.

    Args:
        experiment: Name of the experiment; made where there is none.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, experiment: str = "raypar") -> None:
        super().__init__("mlflow")
        self._mlflow = imported("mlflow", "mlflow", "mlflow")
        self._entities = imported("mlflow.entities", "mlflow", "mlflow")
        self._experiment = experiment
        self._client: Any = None
        self._id = ""
        self._metrics: list[Any] = []
        self._flushed = time.monotonic()

    def _open(self, run: RunFacts) -> None:
        self._client = self._mlflow.MlflowClient()
        file = run.folder / _ID_FILE
        if run.first_step and file.exists():
            self._id = file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, "RUNNING")
            return
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(
            self._experiment
        )  # fmt: skip
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        file.write_text(self._id + "\n", encoding="utf-8")
        param = self._entities.Param
        params = [param(key, str(value)[:_LONGEST]) for key, value in flat(run.config)]
        for start in range(0, len(params), 100):  # MLflow's own limit of one batch
            self._client.log_batch(self._id, params=params[start : start + 100])
        self._client.log_text(self._id, run.plan.explain(), "plan.txt")

    def _write(self, line: dict[str, Any]) -> None:
        stamp = int(1000 * line.get("time", time.time()))
        metric = self._entities.Metric
        self._metrics += [
            metric(name, value, stamp, line["steps_done"]) for name, value in scalars(line).items()
        ]
        if len(self._metrics) >= _BATCH or time.monotonic() - self._flushed > _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        waiting, self._metrics = self._metrics, []
        self._flushed = time.monotonic()
        for start in range(0, len(waiting), _BATCH):
            self._client.log_batch(self._id, metrics=waiting[start : start + _BATCH])

    def _note(self, text: str, step: int) -> None:
        self._client.set_tag(self._id, f"event.{step}", text[:_LONGEST])

    def _close(self, result: dict[str, Any]) -> None:
        self._flush()
        self._client.set_terminated(self._id, "FAILED" if result.get("error") else "FINISHED")


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``a.b``, value) of every leaf of nested dicts."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, value
