"""One GPU: a step of raypar beside the plain PyTorch loop, compiled, and FSDP of one rank.

    python release/gpu/speed.py --shape gpt2-350m-1024 [--systems plain,raypar] [--out DIR]
    python release/gpu/speed.py --device cpu --smoke

Every system runs in a process of its own, which has the device to itself and starts from the same
seed: bfloat16 parameters, the same batch, AdamW (fused on the GPU). A system that fails or is too
slow to come up is told with its reason and does not end the others. First losses are compared:
three steps in bfloat16 agree to a few parts in a thousand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from release.gpu import kit

WARM_UP, STEPS = 5, 15
LOSS_TOLERANCE = 1e-2
START_S = 280.0
"""Longest that one system may take in all, compilation included, in seconds."""
SYSTEMS = ("plain", "plain-compiled", "fsdp-one", "raypar", "raypar-compiled", "raypar-graph")
PAIRS = (
    ("raypar", "plain", "<= 1.03"),
    ("raypar-compiled", "plain-compiled", "<= 1.05"),
    ("raypar-graph", "plain", "<= 1.0"),
    ("raypar", "fsdp-one", "<= 1.0"),
)
"""(ours, theirs, target of ours ÷ theirs)."""

Step = Callable[[int], Any]


def system(name: str, shape_name: str, device: str) -> dict[str, Any]:
    """One system in this process."""
    import torch

    from release.gpu.models import SHAPES, SMOKE

    torch.set_num_threads(1 if device == "cpu" else 8)
    shape = (SHAPES | SMOKE)[shape_name]
    losses: list[float] = []
    torch.manual_seed(0)
    build = _raypar if name.startswith("raypar") else _plain
    step, parameters = build(name, shape, device, losses)
    smoke = shape_name in SMOKE
    times = kit.step_times(step, device, 2 if smoke else WARM_UP, 3 if smoke else STEPS)
    median = kit.spread(times)["median"]
    return {
        "system": name,
        "step_s": kit.spread(times),
        "tokens_per_s": shape.tokens / median,
        "tflops": shape.flops(parameters) / median / 1e12,
        "parameters": parameters,
        "losses": losses[:3],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }


def _plain(name: str, shape: Any, device: str, losses: list[float]) -> tuple[Step, int]:
    import torch

    from release.gpu.solo import adamw

    model = shape.model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    if name == "fsdp-one":
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        store = Path(tempfile.mkdtemp(prefix="raypar-fsdp-")) / "store"
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = adamw(model.parameters())
    run: Any = model
    if name == "plain-compiled":
        # Without its own CUDA graphs, which keep the loss's memory: static shapes and tuning stay.
        run = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    tokens, targets = (t.to(device) for t in shape.data())

    def step(index: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = run(tokens, targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    return step, parameters


def _raypar(name: str, shape: Any, device: str, losses: list[float]) -> tuple[Step, int]:
    import raypar
    from release.gpu.solo import Solo, solo_plan

    engines: Any = {"raypar-compiled": "compiled", "raypar-graph": "cuda_graph"}
    batch = shape.data()
    graph = raypar.capture(shape.model, batch)
    plan = solo_plan(graph, device)
    solo = Solo(graph, plan, batch, device, engines.get(name, "eager"))
    solo.losses = losses
    return solo.step, sum(p.numel() for p in shape.model().parameters())


def compared(rows: list[dict[str, Any]], shape: str) -> tuple[dict[str, float], list[kit.Target]]:
    """Ratios of ours to theirs, and the targets of those that have one."""
    found = {row["system"]: row for row in rows if "step_s" in row}
    ratios: dict[str, float] = {}
    targets = []
    for ours, theirs, bound in PAIRS:
        if ours in found and theirs in found:
            name = f"{ours} ÷ {theirs}"
            own, other = (found[k]["step_s"]["median"] for k in (ours, theirs))
            ratios[name] = own / other
            targets.append(kit.Target(f"{shape}: {name}", ratios[name], bound))
    return ratios, targets


def loss_gap(rows: list[dict[str, Any]]) -> float:
    """Largest difference of first losses from those of the first system, relative."""
    lists = [row["losses"] for row in rows if row.get("losses")]
    return max(
        (abs(a / b - 1.0) for own in lists for a, b in zip(own, lists[0], strict=False)),
        default=0.0,
    )


def in_its_process(
    name: str, shape: str, options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Runs one system and returns its row, or why there is none."""
    command = [sys.executable, __file__, "--one", name, "--shape", shape]
    command += ["--device", options.device]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env={**os.environ}
        )
    except subprocess.TimeoutExpired:
        return {"system": name, "failed": f"not done within {seconds:.0f} s"}
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    if done.returncode or not lines:
        why = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"system": name, "failed": why}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def main() -> int:
    """Measures; returns the exit code."""
    parser = kit.parser(__doc__)
    parser.add_argument("--shape", help="which model; see release/gpu/models.py")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(system(options.one, options.shape, options.device)))
        return 0
    shape = options.shape or ("gpt-smoke" if options.smoke else "gpt2-350m-1024")
    rows = []
    budget = kit.Budget()
    for name in options.systems.split(","):
        rows.append(in_its_process(name, shape, options, min(START_S, budget.left)))
        row = rows[-1]
        said = row.get("failed") or f"{row['step_s']['median'] * 1e3:.2f} ms, " + (
            f"{row['tokens_per_s']:.0f} tokens/s, {row['tflops']:.1f} TFLOP/s, "
            f"{row['peak_bytes'] / 1e9:.1f} GB, losses {row['losses']}"
        )
        print(f"{shape} {name}: {said}", flush=True)
    ratios, targets = compared(rows, shape)
    targets.append(
        kit.Target(f"{shape}: gap of first losses", loss_gap(rows), f"<= {LOSS_TOLERANCE}")
    )
    failed = [row["system"] for row in rows if "failed" in row]
    targets.append(kit.Target(f"{shape}: systems that failed", len(failed), "== 0"))
    figures = {"shape": shape, "systems": rows, "ratios": ratios}
    return kit.write(options, f"speed {shape}", figures, targets)


if __name__ == "__main__":
    sys.exit(main())
