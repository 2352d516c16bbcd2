"""A Grafana dashboard of all runs of a Ray cluster, made from the table of metrics.

Ray exports the gauges that a run sets to Prometheus; `raypar.train.loggers.ray_metrics` sets them.
Import the JSON under *Dashboards → New → Import* and choose the Prometheus data source.
"""

from __future__ import annotations

from typing import Any

from raypar.train.dashboards.table import METRICS, Metric

_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN = 'run=~"$run"'


def grafana_dashboard() -> dict[str, Any]:
    """The dashboard as the JSON that Grafana imports (schema version 39, Grafana 10 and later)."""
    panels: list[dict[str, Any]] = []
    top = 0
    for group in dict.fromkeys(metric.group for metric in METRICS):
        members = [metric for metric in METRICS if metric.group == group]
        panels.append(_row(len(panels) + 1, group, top))
        top += 1
        for at, metric in enumerate(members):
            line, column = divmod(at * _WIDTH, _COLUMNS)
            panels.append(_panel(len(panels) + 1, metric, column, top + line * _HEIGHT))
        top += -(-len(members) * _WIDTH // _COLUMNS) * _HEIGHT
    return {
        "title": "raypar runs",
        "uid": "raypar-runs",
        "tags": ["raypar", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_choice(), _run_choice()]},
        "panels": panels,
    }


def _datasource_choice() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource",
            "query": "prometheus"}  # fmt: skip


def _run_choice() -> dict[str, Any]:
    query = f"label_values(ray_{METRICS[0].gauge}, run)"
    return {
        "name": "run",
        "label": "run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _row(number: int, group: str, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
    return {"id": number, "type": "row", "title": group, "gridPos": place, "panels": []}


def _panel(number: int, metric: Metric, column: int, top: int) -> dict[str, Any]:
    labels = ["run", metric.tag] if metric.tag else ["run"]
    stacked = metric.tag == "part"
    custom = {
        "fillOpacity": 40 if stacked else 0,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "showPoints": "never",
    }
    return {
        "id": number,
        "type": "timeseries",
        "title": metric.title,
        "description": metric.meaning,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": column, "y": top},
        "fieldConfig": {"defaults": {"unit": metric.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"showLegend": True, "placement": "bottom"}},
        "targets": [
            {
                "refId": "A",
                "datasource": _SOURCE,
                "expr": f"max by ({', '.join(labels)}) (ray_{metric.gauge}{{{_RUN}}})",
                "legendFormat": " ".join(f"{{{{{label}}}}}" for label in labels),
            }
        ],
    }
