"""Does reading ahead hide a loader that is as fast as the model?

Two stage actors run steps of a set length, as ranks with a GPU do, whose processor is free
meanwhile. That length is what the loader by itself, measured just before, needs for a batch (or a
share of it more). Three kinds of loader: one that waits (a network file system), dealt out by rank
0; single samples, which both ranks read themselves; and samples that compute, in a worker process.
Prints, and with ``--json FILE`` writes, the time that the worst rank waited for its inputs as a
share of the time of all steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader, Dataset

from raypar.comm.group import Group
from raypar.stages.remote import RayRun
from raypar.stages.run import StepResult
from raypar.stages.spec import RankSpec, StepReport
from raypar.train.data import BatchForm, batches, peek
from raypar.train.feed import AHEAD, DataFeed, RemadeBatches
from raypar.train.session import start_private_ray
from release._figures import write_figures
from release._idle import IdleRunner, idle_specs

BATCH = 16
WIDTH = 1 << 16
ALONE = 20  # batches over which a loader's own pace is measured


class Waits:
    """Batches that take a while to come."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __iter__(self) -> Iterator[Any]:
        batch = torch.zeros(BATCH, WIDTH), torch.zeros(BATCH)
        while True:
            time.sleep(self._seconds)
            yield batch


class Samples(Dataset[Any]):
    """Samples that take a while each: waiting, or computing."""

    def __init__(self, seconds: float, computes: bool = False) -> None:
        self._seconds = seconds
        self._computes = computes

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Any:
        if self._computes:
            end = time.thread_time() + self._seconds
            while time.thread_time() < end:
                sum(range(100))
        else:
            time.sleep(self._seconds)
        return torch.zeros(WIDTH), torch.tensor(float(index))


class SteadyRunner(IdleRunner):
    """A step waits for the other ranks, as a real one does, and then for the rest of its time."""

    def __init__(self, seconds: float, spec: RankSpec, world: Group) -> None:
        super().__init__(spec, world)
        self._seconds = seconds
        self._world = world

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        self._world.all_reduce(torch.ones(1)).wait()
        time.sleep(self._seconds)
        return super().step(step, inputs)


def pace(data: Any) -> float:
    """Seconds that a loader by itself needs for a batch."""
    times = [time.perf_counter()]
    for _ in itertools.islice(data, ALONE):
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(times[2:]))


def measured(data: Any, step_s: float, steps: int, ahead: int) -> tuple[float, float]:
    """(share of the steps' time that the worst rank waited for data, mean step in seconds)."""
    opened = peek(data, 0)
    source = RemadeBatches(data, 0, by_rows=opened.by_rows)
    # The first stage takes the inputs, the last one the targets.
    specs = idle_specs(2, global_batch=BATCH, inputs=True, batch_dims=(0, 0))
    feed = DataFeed(source, BatchForm(opened.example), specs, ahead=ahead)
    results: list[StepResult] = []
    with RayRun(specs, feed=feed, runner=partial(SteadyRunner, step_s)) as run:
        run.call("prefetch", 0, steps)
        run.train(0, steps, results.append)
    waited = [sum(r.ranks[rank].seconds.get("data", 0.0) for r in results) for rank in range(2)]
    total = sum(result.seconds for result in results)
    return max(waited) / total, total / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-s", type=float, default=0.1, help="seconds for a batch")
    parser.add_argument("--ahead", type=int, nargs="+", default=[AHEAD])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 1.0])
    options = parser.parse_args()
    sample_s = options.batch_s / BATCH
    loaders = {
        "a loader that waits, dealt by rank 0": Waits(options.batch_s),
        "samples that wait, read by each rank": batches(Samples(sample_s), BATCH),
        "samples that compute, 1 worker process": DataLoader(
            Samples(sample_s, computes=True), batch_size=BATCH, num_workers=1
        ),
    }
    rows: list[dict[str, Any]] = []
    with start_private_ray(3):
        for ahead, share in itertools.product(options.ahead, options.shares):
            for name, data in loaders.items():
                alone = pace(data)
                waited, step = measured(data, alone / share, options.steps, ahead)
                row = {"loader": name, "ahead": ahead, "loader_share_of_step": share}
                rows.append({**row, "batch_s": alone, "step_s": step, "data_wait": waited})
                print(
                    f"{name}: {alone * 1e3:.1f} ms a batch, {share:.0%} of a step, {ahead} ahead: "
                    f"data wait {waited:.2%} (target: below 1 %)",
                    flush=True,
                )
    if options.json:
        write_figures(options.json, rows)


if __name__ == "__main__":
    main()
