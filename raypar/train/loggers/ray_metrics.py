"""Gauges that Ray exports to Prometheus, tagged with the run's name."""

from __future__ import annotations

from typing import Any

from raypar.train.callbacks import RunFacts
from raypar.train.dashboards.table import METRICS
from raypar.train.loggers.base import Logger


class RayMetricsLogger(Logger):
    """Sets one gauge for every metric of the table, while this process is connected to Ray.

    In Prometheus they are called ``ray_raypar_loss`` and so on; `raypar.train.dashboards` has a
    Grafana dashboard of them.
    """

    def __init__(self) -> None:
        super().__init__("ray")
        self._run = ""
        self._gauges: dict[str, Any] = {}

    def _open(self, run: RunFacts) -> None:
        import ray
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            return
        self._run = run.name
        for metric in METRICS:
            tags = ("run", metric.tag) if metric.tag else ("run",)
            text = f"{metric.title}: {metric.meaning}"
            self._gauges[metric.name] = Gauge(metric.gauge, description=text, tag_keys=tags)

    def _write(self, line: dict[str, Any]) -> None:
        for metric in METRICS:
            gauge = self._gauges.get(metric.name)
            if gauge is None:
                continue
            for tag, value in metric.values(line):
                gauge.set(value, tags={"run": self._run, **({metric.tag: tag} if tag else {})})

    def _close(self, result: dict[str, Any]) -> None:
        self._gauges.clear()
