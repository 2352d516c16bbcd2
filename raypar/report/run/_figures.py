"""The figures at the head of a run's page."""

from __future__ import annotations

import statistics
from typing import Any

from raypar._plan_text import count_of, duration, size
from raypar.report.page._figures import Figure
from raypar.report.run._curves import number
from raypar.report.run.files import RunFiles
from raypar.report.run.measured import MeasuredStep


def figures(run: RunFiles, measured: MeasuredStep | None) -> list[Figure]:
    """What one looks at first; what is not known is left out."""
    found = [_outcome(run), _loss(run), _step(run), _throughput(run), _bubble(run)]
    found += [_mfu(run), _memory(run, measured), _devices(run)]
    return [one for one in found if one is not None]


def typical(run: RunFiles, key: str) -> float | None:
    """The median of a figure over all steps but the first, which warms up."""
    lines = run.steps[1:] or run.steps
    known = [value for line in lines if (value := number(line.get(key))) is not None]
    return statistics.median(known) if known else None


def _outcome(run: RunFiles) -> Figure:
    done = run.steps[-1]["step"] + 1 if run.steps else 0
    if run.result is None:
        return Figure("steps", str(done), "the run goes on, or was killed", "warn")
    error = run.result.get("error")
    if error:
        kind = str(error).partition(":")[0][:40]
        return Figure("steps", f"{done}, then an error", kind, "warn")
    seconds = sum(line["step_s"] for line in run.steps)
    return Figure("steps", str(done), f"finished; {duration(seconds)} of training" if done else "")


def _loss(run: RunFiles) -> Figure | None:
    known = [value for line in run.steps if (value := number(line.get("loss"))) is not None]
    if not known:
        return None
    words = f"of the last step; {known[0]:.4g} at the first one"
    best = [v for line in run.evaluations if (v := number(line.get("eval_loss"))) is not None]
    if best:
        words += f"; evaluation {best[-1]:.4g}, at best {min(best):.4g}"
    return Figure("loss", f"{known[-1]:.4g}", words)


def _step(run: RunFiles) -> Figure | None:
    seconds = typical(run, "step_s")
    if seconds is None:
        return None
    if run.prediction is None:
        return Figure("step time", duration(seconds), "median of all steps but the first")
    other = run.prediction.step_s
    return Figure(
        "step time",
        duration(seconds),
        f"median of all steps but the first; predicted {duration(other)} "
        f"({100 * (other / seconds - 1):+.0f} %; costs: {run.prediction.source})",
    )


def _throughput(run: RunFiles) -> Figure | None:
    tokens, samples = typical(run, "tokens_per_s"), typical(run, "samples_per_s")
    if samples is None:
        return None
    value = f"{samples:,.0f} samples/s" if tokens is None else f"{tokens:,.0f} tokens/s"
    batch = count_of(run.plan.global_batch, "sample") if run.plan else ""
    return Figure("throughput", value, f"{batch} a step" if batch else "median over the run")


def _bubble(run: RunFiles) -> Figure | None:
    shares = []
    for line in run.steps[1:]:
        waited, seconds = number(line.get("breakdown", {}).get("bubble")), line["step_s"]
        if waited is not None and seconds > 0:
            shares.append(waited / seconds)
    if not shares:
        return None
    words = "share of the step in which ranks wait for somebody who has not sent yet"
    if run.prediction is not None:
        words += f"; predicted {run.prediction.bubble:.1%}"
    return Figure("bubble", f"{statistics.median(shares):.1%}", words)


def _mfu(run: RunFiles) -> Figure | None:
    value = typical(run, "mfu")
    words = "model FLOPs per second, as a share of what the devices could compute"
    return None if value is None else Figure("MFU", f"{value:.1%}", words)


def _memory(run: RunFiles, measured: MeasuredStep | None) -> Figure | None:
    if measured is None or not measured.memory:
        return None
    words = "tensors of the fullest rank: what it holds, and keeps from forward to backward"
    if run.prediction is not None:
        words += f"; predicted {size(max(run.prediction.peak_bytes))} with all else that it needs"
    return Figure("peak memory", size(max(measured.peak_bytes)), words)


def _devices(run: RunFiles) -> Figure | None:
    if run.plan is None:
        return None
    plan = run.plan
    return Figure(
        "devices",
        str(len(plan.devices)),
        f"{plan.device}; {count_of(len(plan.stages), 'stage')}, "
        f"{count_of(plan.replicas, 'replica')}, {count_of(plan.microbatches, 'microbatch')} a "
        f"step, schedule {plan.schedule.name}",
    )


def startup(result: dict[str, Any] | None) -> list[tuple[str, str]]:
    """(part, seconds in words) of what came before the first step."""
    parts = (result or {}).get("startup")
    if not isinstance(parts, dict):
        return []
    return [
        (str(name), duration(value))
        for name, own in parts.items()
        if (value := number(own)) is not None
    ]
