"""Some steps of a plan, timed: measured beside predicted, and where the time goes."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from raypar._targets import (
    autocast_of,
    data_of,
    loss_of,
    model_of,
    network_of,
    optimizer_of,
    scaling_of,
    scheduler_of,
    search_of,
)
from raypar.config import Config
from raypar.report.run.predicted import read_prediction
from raypar.report.run.writer import PREDICTED_FILE
from raypar.search.interop.contest import in_words
from raypar.train.callbacks import Callback
from raypar.train.config import CheckpointConfig, RunConfig
from raypar.train.trainer import Trainer

_WARM_UP = 2
"""First steps that do not count: memory is taken, caches are cold."""


class _Lines(Callback):
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


def bench_config(config: Config, plan_file: str | None, steps: int) -> dict[str, Any]:
    """Runs some steps of the configured training, without checkpoints or files that stay.

    Args:
        config: The run.
        plan_file: The plan; default: the one that the configuration would get.
        steps: Steps; the first two do not count.

    Returns:
        ``steps`` that count, ``step_s`` (median, ``lowest``, ``highest``), ``predicted_s`` and
        what its ``costs`` rest on, rates, ``mfu`` where it is known, ``breakdown`` (part → median
        seconds), ``plan`` in words.
    """
    seen = _Lines()
    with tempfile.TemporaryDirectory(prefix="raypar-bench-") as folder:
        run = RunConfig(
            name="bench",
            storage_path=folder,
            log_every=0,
            checkpoint_config=CheckpointConfig(at_end=False),
            callbacks=[seen],
        )
        result = Trainer(
            model_of(config),
            loss_fn=loss_of(config),
            optimizer=optimizer_of(config),
            data=data_of(config),
            plan=plan_file or "auto",
            steps=steps,
            seed=config.train.seed,
            clip_norm=config.train.clip_norm,
            scheduler=scheduler_of(config),
            precision=autocast_of(config),
            accumulate=config.train.accumulate,
            ema_decay=config.train.ema_decay,
            engine=config.train.engine,
            scaling_config=scaling_of(config),
            run_config=run,
            search_config=search_of(config),
            network=network_of(config),
        ).fit()
        written = Path(result.path) / PREDICTED_FILE
        predicted = read_prediction(written) if written.exists() else None
    counted = seen.lines[_WARM_UP:]
    seconds = [line["step_s"] for line in counted]
    names = ("tokens_per_s", "samples_per_s", "mfu")
    parts = counted[0].get("breakdown", {})
    return {
        "steps": len(counted),
        "step_s": statistics.median(seconds),
        "lowest_s": min(seconds),
        "highest_s": max(seconds),
        "predicted_s": predicted and predicted.step_s,
        "costs": predicted and predicted.source,
        **{
            name: statistics.median(line[name] for line in counted)
            for name in names
            if name in counted[0]
        },
        "breakdown": {
            part: statistics.median(line["breakdown"][part] for line in counted) for part in parts
        },
        "plan": in_words(result.plan),
    }


def bench_text(found: dict[str, Any]) -> str:
    """What `bench_config` found, for people."""
    step_s, predicted = found["step_s"], found["predicted_s"]
    lines = [
        str(found["plan"]),
        f"step {1000 * step_s:.1f} ms, median of {found['steps']} "
        f"({1000 * found['lowest_s']:.1f} to {1000 * found['highest_s']:.1f})",
    ]
    if predicted:
        lines.append(
            f"predicted {1000 * predicted:.1f} ms: measured ÷ predicted {step_s / predicted:.2f} "
            f"(costs: {found['costs']})"
        )
    rates = [
        f"{found[name]:,.0f} {name.removesuffix('_per_s')}/s"
        for name in ("tokens_per_s", "samples_per_s")
        if name in found
    ]
    if "mfu" in found:
        rates.append(f"MFU {100 * found['mfu']:.1f} %")
    lines.append(", ".join(rates))
    lines += [
        f"  {part:<14}{1000 * seconds:9.1f} ms  {100 * seconds / step_s:5.1f} %"
        for part, seconds in found["breakdown"].items()
    ]
    return "\n".join(lines)
