"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypar.errors import ConfigError
from raypar.plan import Plan
from raypar.train.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """The outcome of `Trainer.fit`.

    Attributes:
        metrics: ``loss`` of the last step, ``steps``, ``seconds`` (of all steps),
            ``samples_per_s``, ``tokens_per_s`` where a batch is one of tokens, ``grad_norm``,
            ``startup`` (seconds of each part before the first step), ``driver_share`` (CPU time
            of the driver actor per wall time).
        path: The run's folder: ``plan.json``, ``metrics.jsonl``, ``result.json``, ``checkpoints/``.
        plan: What was run.
        checkpoint: The newest one, which holds the trained model
            (``result.checkpoint.state_dict()``); None where the run writes none.
        error: None; a failed run raises, and leaves this as text in ``result.json``.
    """

    metrics: dict[str, Any]
    path: Path
    plan: Plan
    checkpoint: Checkpoint | None = None
    error: BaseException | None = None

    @property
    def metrics_dataframe(self) -> Any:
        """All lines of ``metrics.jsonl`` that are steps, as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError:
            raise ConfigError(
                "metrics_dataframe needs pandas: pip install pandas, or read "
                f"{self.path / 'metrics.jsonl'}, one JSON object a line"
            ) from None
        from raypar.train.metrics_file import is_step, read_lines

        lines = read_lines(self.path / "metrics.jsonl")
        return pandas.json_normalize([line for line in lines if is_step(line)])

    def _repr_html_(self) -> str:
        from raypar.report.notebook import result_html

        return result_html(self)
