"""`make demo`: a small GPT, trained over two pipeline stages held by Ray actors on this machine.

Starts a Ray of its own, so that no running cluster, address or token of the environment matters.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from raypar._launch import train_config
from raypar.config import load_config
from raypar.errors import RayparError
from raypar.train.session import start_private_ray

GOAL = 2.2
"""Nats per byte that the demo has to get below; a uniform guess is 5.55."""


def main() -> int:
    """Trains, reports, and returns the exit code."""
    try:
        config = load_config(Path(__file__).with_name("demo.yaml"), sys.argv[1:])
        workers = 2 if config.mesh.num_workers == "auto" else config.mesh.num_workers
        if workers == 0:
            result = train_config(config)
        else:
            # Logical CPUs: two actors share the core of a machine that has one.
            print("starting a Ray on this machine, and the model's ranks on it", flush=True)
            with start_private_ray(max(workers, os.cpu_count() or 1)):
                result = train_config(config)
    except RayparError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    with (result.path / "metrics.jsonl").open() as file:
        losses = [json.loads(line)["loss"] for line in file]
    tail = losses[-20:]
    final = sum(tail) / len(tail)
    print(f"\nloss {losses[0]:.2f} → {final:.2f} nats/byte (mean of the last {len(tail)} steps)")
    print(f"{result.metrics['tokens_per_s']:,.0f} tokens/s over {len(result.plan.stages)} stages")
    print(f"files: {result.path}/ (plan.json, metrics.jsonl, checkpoints/, config.resolved.yaml)")
    print(f"as one page: {Path(sys.executable).with_name('raypar')} report {result.path}")
    if len(losses) >= config.train.steps and final > GOAL:
        print(f"the loss did not get below {GOAL} nats/byte", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
