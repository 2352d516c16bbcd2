"""Where else a run's metrics go: TensorBoard, MLflow, Weights & Biases, Ray's gauges.

Each is a `raypar.train.callbacks.Callback`; `make_loggers` makes them by name. ``metrics.jsonl`` is
written always (`raypar.train.metrics`), and so are events (`raypar.train.loggers.events`).
"""

from raypar.train.loggers.base import Logger
from raypar.train.loggers.events import EventLog
from raypar.train.loggers.registry import LOGGERS, make_loggers

__all__ = ["LOGGERS", "EventLog", "Logger", "make_loggers"]
