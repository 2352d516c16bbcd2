"""raypar on Ray with a GPU: a small run end to end, a checkpoint, and a resume from it.

python release/gpu/ray_train.py [--out DIR]
python release/gpu/ray_train.py --device cpu --smoke
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    )

from release.gpu import kit

STEPS = 12


def main() -> int:
    """Trains; returns the exit code."""
    options = kit.parser(__doc__).parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    on_gpu = options.device == "cuda"
    # A socket's path has at most 107 characters: Ray's folder needs a short one.
    with tempfile.TemporaryDirectory(prefix="rpg-", dir="/tmp") as folder:
        ray.init(
            num_cpus=4,
            num_gpus=1 if on_gpu else 0,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            figures = _train(on_gpu, folder)
        finally:
            ray.shutdown()
    targets = [
        kit.Target("steps of both runs", figures["steps"], f"== {STEPS}"),
        kit.Target("last loss ÷ first", figures["losses"][-1] / figures["losses"][0], "<= 1.0"),
    ]
    return kit.write(options, "ray", figures, targets)


class Batches:
    """One batch for ever; the model learns it by heart."""

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        from release.gpu.models import SMOKE

        return itertools.repeat(SMOKE["gpt-smoke"].data())


def _optimizer(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-2)


def _train(on_gpu: bool, folder: str) -> dict[str, Any]:
    """Half of the steps, and the other half in a second run that begins from the checkpoint."""
    import raypar as rp
    from release.gpu.models import SMOKE
    from release.gpu.solo import solo_plan

    shape = SMOKE["gpt-smoke"]
    graph = rp.capture(shape.model, shape.data())
    plan = solo_plan(graph, "cuda" if on_gpu else "cpu", 2)
    began = time.perf_counter()
    results = [
        rp.Trainer(
            shape.model,
            optimizer=_optimizer,
            data=Batches,
            plan=plan,
            steps=steps,
            resume_from="auto",
            scaling_config=rp.ScalingConfig(num_workers=1, use_gpu=on_gpu, threads_per_worker=1),
            run_config=rp.RunConfig(name="gpu", storage_path=f"{folder}/runs"),
        ).fit()
        for steps in (STEPS // 2, STEPS)
    ]
    return {
        "steps": int(results[-1].metrics["step"]) + 1,
        "losses": [float(r.metrics["loss"]) for r in results],
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    sys.exit(main())
