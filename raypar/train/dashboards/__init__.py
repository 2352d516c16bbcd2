"""What of a run can be watched: one table of metrics, and the dashboards made from it."""

from raypar.train.dashboards.grafana import grafana_dashboard
from raypar.train.dashboards.table import METRICS, Metric, scalars

__all__ = ["METRICS", "Metric", "grafana_dashboard", "scalars"]
