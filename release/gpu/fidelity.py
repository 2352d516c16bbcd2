"""Simulated and measured steps of one GPU: models × batch × microbatches × recomputation.

    python release/gpu/fidelity.py --calibration FILE [--out DIR]     # FILE: of device.py
    python release/gpu/fidelity.py --device cpu --smoke

At least 20 configurations. Each is planned for one device, simulated with the calibration, and then
run in this process. Reported: mean absolute relative error, bias, rank correlation.
"""

from __future__ import annotations

import gc
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import raypar
from raypar.mesh.calibration import Calibration, table_calibration
from raypar.search.simulate import simulate
from release.gpu import kit
from release.gpu.models import Shape
from release.gpu.solo import Solo, solo_cluster, solo_plan
from release.simulator import spearman

TARGETS = {"mape": "<= 0.15", "spearman": ">= 0.9"}
BASES = {
    "gpt-small": Shape("gpt", 12, 768, 12, 3072, 50304, 1024, 8),
    "gpt-wide": Shape("gpt", 4, 2048, 16, 8192, 50304, 1024, 8),
    "llama-small": Shape("llama", 12, 1024, 16, 2816, 32000, 1024, 8),
    "llama-long": Shape("llama", 6, 1024, 16, 2816, 32000, 4096, 2),
}
FORMS = ((1, "none"), (2, "none"), (4, "none"), (1, "full"), (2, "selective"))
"""(microbatches, recomputation)."""
BATCHES = (1, 2)
"""Factors of the batch for the first form."""


def configurations(smoke: bool) -> list[tuple[str, Shape, int, str]]:
    """(name, shape, microbatches, recomputation)."""
    if smoke:
        tiny = Shape("gpt", 2, 32, 2, 64, 61, 16, 4)
        return [("tiny", tiny, 1, "none"), ("tiny", replace(tiny, batch=8), 2, "full")]
    found = []
    for name, shape in BASES.items():
        for microbatches, recompute in FORMS:
            for factor in BATCHES if (microbatches, recompute) == FORMS[0] else (1,):
                # Two samples at least in every microbatch.
                batch = max(shape.batch * factor, 2 * microbatches)
                found.append((name, replace(shape, batch=batch), microbatches, recompute))
    return found


def one(
    shape: Shape, microbatches: int, recompute: str, device: str, known: Calibration
) -> dict[str, float]:
    """Predicted and measured seconds of a step."""
    batch = shape.data()
    graph = raypar.capture(shape.model, batch)
    plan = solo_plan(graph, device, microbatches, recompute)
    cluster = solo_cluster(device)
    predicted = simulate(graph, plan, cluster, calibration=known).step_s
    solo = Solo(graph, plan, batch, device)
    try:
        times = kit.step_times(solo.step, device, 3, 8)
    finally:
        solo.close()
    return {"predicted_s": predicted, "measured_s": kit.spread(times)["median"]}


def main() -> int:
    """Measures; returns the exit code."""
    parser = kit.parser(__doc__)
    parser.add_argument("--calibration", type=Path, help="JSON file that device.py wrote")
    options = parser.parse_args()
    known = (
        Calibration.from_json(options.calibration.read_text())
        if options.calibration
        else table_calibration(solo_cluster(options.device))
    )
    rows: list[dict[str, Any]] = []
    budget = kit.Budget()
    for name, shape, microbatches, recompute in configurations(options.smoke):
        row: dict[str, Any] = {
            "model": name,
            "batch": shape.batch,
            "microbatches": microbatches,
            "recompute": recompute,
        }
        try:
            if not budget.left:
                raise RuntimeError("no time was left")
            row |= one(shape, microbatches, recompute, options.device, known)
            off = row["predicted_s"] / row["measured_s"] - 1.0
            said = f"{row['predicted_s'] * 1e3:.2f} of {row['measured_s'] * 1e3:.2f} ms, {off:+.1%}"
        except (raypar.RayparError, RuntimeError) as error:
            said = row["failed"] = f"{type(error).__name__}: {error}"
        print(f"{name} batch {shape.batch} M={microbatches} {recompute}: {said}", flush=True)
        rows.append(row)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    done = [r for r in rows if "measured_s" in r]
    errors = [r["predicted_s"] / r["measured_s"] - 1.0 for r in done]
    figures = {
        "calibrated": known.measured,
        "configurations": len(done),
        "mape": statistics.fmean(map(abs, errors)) if errors else 1.0,
        "bias": statistics.fmean(errors) if errors else 0.0,
        "spearman": spearman([r["predicted_s"] for r in done], [r["measured_s"] for r in done]),
        "rows": rows,
    }
    targets = [kit.Target(name, figures[name], bound) for name, bound in TARGETS.items()]
    targets.append(kit.Target("configurations", len(done), ">= 20"))
    return kit.write(options, "fidelity", figures, targets)


if __name__ == "__main__":
    sys.exit(main())
