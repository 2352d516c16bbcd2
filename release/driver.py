"""How much the driver actor costs: steps per second with empty programs, and its share of a step.

Prints, and with ``--json FILE`` writes, the rate at which two stage actors run empty steps (with
calls as raypar makes them, and with one step per call), and the CPU time of the driver actor as a
share of the wall time of real steps of a small GPT-like stack.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import raypar as rp
from raypar.stages.compile import compile_plan
from raypar.stages.remote import RayRun
from raypar.train.data import BatchForm
from raypar.train.feed import DataFeed, RemadeBatches
from raypar.train.session import start_private_ray
from release._figures import write_figures
from release._idle import IdleRunner, idle_specs

REPEATS = 3
WIDTH = 512


def empty_rate(steps: int, steps_per_call: int | None) -> float:
    """Steps per second over two actors, the median of some runs."""
    with RayRun(idle_specs(2), runner=IdleRunner, steps_per_call=steps_per_call) as run:
        run.train(0, 200)
        rates = []
        for i in range(REPEATS):
            began = time.perf_counter()
            run.train(200 + i * steps, steps)
            rates.append(steps / (time.perf_counter() - began))
    return statistics.median(rates)


def model() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)]
    return nn.Sequential(*layers)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(256, WIDTH), torch.randn(256, WIDTH))]


def optimizer(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)  # type: ignore[arg-type]


def real_share(steps: int) -> tuple[float, float]:
    """(driver CPU time per wall time, seconds per step) of real steps on two actors."""
    example = batches()[0]
    graph = rp.capture(model, example, nn.functional.mse_loss)
    cluster = rp.Cluster.local(2)
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=4))
    specs = compile_plan(graph, plan, optimizer=optimizer, threads=1)
    feed = DataFeed(RemadeBatches(batches, 0), BatchForm(example), specs)
    with RayRun(specs, feed=feed) as run:
        run.train(0, 5)
        began = time.perf_counter()
        run.train(5, steps)
        seconds = (time.perf_counter() - began) / steps
        assert run.driver_share is not None
        return run.driver_share, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--empty-steps", type=int, default=5000)
    parser.add_argument("--real-steps", type=int, default=40)
    options = parser.parse_args()
    with start_private_ray(3):
        pipelined = empty_rate(options.empty_steps, None)
        single = empty_rate(max(1, options.empty_steps // 5), 1)
        share, seconds = real_share(options.real_steps)
    found = {
        "empty_steps_per_s": pipelined,
        "empty_steps_per_s_one_per_call": single,
        "driver_share": share,
        "real_step_s": seconds,
    }
    print(f"empty programs on 2 actors: {pipelined:,.0f} steps/s (target: at least 1,000)")
    print(f"the same, one step per actor call: {single:,.0f} steps/s")
    print(
        f"driver's share of a real step of {seconds * 1000:.0f} ms: {share:.2%} (target: below 1 %)"
    )
    if options.json:
        write_figures(options.json, found)


if __name__ == "__main__":
    main()
