"""Does training go on from a checkpoint as if nothing had been, and what does one cost?

    python release/checkpoint.py [--json FILE] [--seeds N] [--kills N] [--only PART]

`resume`: models × optimizers, each stopped after a random step, with random plans whose ops are
sharded at every ZeRO level: under the same plan the losses that follow must be equal bit for bit,
under another one within 1e-9 in float64. `kills`: a run that is killed at random moments while it
writes one checkpoint after the other. `cost`: a GPT of 100M parameters with AdamW in float32 on
actors of a private Ray: how long training stands still for a checkpoint, as a share of 20 steps,
and what writing it beside them does to steps. `load`: that model saved by 4 ranks and taken by 2,
and saved by 1 and taken by 4: the most memory that any rank had beside what it started with, over
its own share of parameters and optimizer states. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release` and `tests`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from raypar import Cluster, capture
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.remote import RayRun
from raypar.stages.snapshot import RankState
from raypar.testing import random_plan
from raypar.testing.backends import RepeatFeed
from raypar.testing.equivalence import default_optimizer
from raypar.train.checkpoint import Checkpoint, CheckpointStore
from raypar.train.config import CheckpointConfig
from raypar.train.state import TrainState
from release._figures import about, write_figures
from release._gpt import Gpt, random_ids
from release._resident import count_peak_anew, peak_resident, resident

MODELS = ("mlp", "gpt", "cnn", "moe_dense")
EVERY = 20
STALL, PEAK, CLOSE = 0.05, 1.3, 1e-9
BATCH, LENGTH, VOCABULARY = 4, 64, 19000
LARGE = partial(Gpt, layers=12, width=768, heads=12, vocabulary=VOCABULARY, length=LENGTH)
ROOT = Path(__file__).resolve().parents[1]


# ---- resume -------------------------------------------------------------------------------


def resume(seeds: int) -> dict[str, Any]:
    """Every model with every optimizer, stopped after a random step."""
    from tests.train.checkpoint import runs

    lines = []
    for name in MODELS:
        feels = runs.graph_of(name).feels_microbatches
        for optimizer in runs.OPTIMIZERS:
            for seed in range(seeds):
                draw = random.Random(f"{name} {optimizer.__name__} {seed}")
                parts = draw.choice((1, 2, 4)) if feels else None
                before, after = (
                    runs.plan_of(name, draw.randrange(1000), parts=parts) for _ in range(2)
                )
                stop = draw.randint(0, 6)
                line = _resumed(name, optimizer, before, after, stop)
                lines.append(line)
                print(line, flush=True)
    return {
        "cases": len(lines),
        "same_plan_equal": sum(line["equal"] for line in lines),
        "other_plan_off": max(line["off"] for line in lines),
        "lines": lines,
    }


def _resumed(
    name: str, optimizer: Callable[..., Any], before: Plan, after: Plan, stop: int
) -> dict[str, Any]:
    from tests.train.checkpoint import runs

    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(folder)
        with runs.start(name, before, optimizer) as run:
            runs.losses(run, 0, stop)
            saved = runs.save(store, run, before, stop)
            wanted = runs.losses(run, stop, 4)
            end = run.state_dict()
        with runs.start(name, before, optimizer, seed=9) as run:
            saved.restore(run)
            equal = runs.losses(run, stop, 4) == wanted
            found = run.state_dict()
            equal = equal and all(torch.equal(found[key], end[key]) for key in end)
        with runs.start(name, after, optimizer, seed=9) as run:
            saved.restore(run)
            losses = runs.losses(run, stop, 4)
        store.close()
    off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, wanted, strict=True))
    return {
        "model": name, "optimizer": optimizer.__name__, "step": stop, "equal": equal, "off": off,
        "ranks": [len(before.devices), len(after.devices)],
    }  # fmt: skip


def kills(count: int) -> dict[str, Any]:
    """SIGKILL at random moments."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.train.checkpoint.killed", folder, str(count), "7"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


# ---- the large model ----------------------------------------------------------------------


def large() -> tuple[OpGraph, torch.Tensor]:
    """A GPT of 100M parameters and a batch."""
    batch = random_ids(VOCABULARY, BATCH, LENGTH)
    return capture(LARGE, batch), batch


def plan_for(graph: OpGraph, stages: int, replicas: int, zero: int) -> Plan:
    """Equal stages; replicas cut what the level says."""
    plan = random_plan(
        graph, Cluster.local(stages * replicas), stages=1, replicas=replicas, microbatches=1
    )
    if stages > 1:
        from raypar import SearchConfig
        from raypar import plan as make_plan

        config = SearchConfig(stages=stages, replicas=replicas, microbatches=1)
        plan = make_plan(graph, Cluster.local(stages * replicas), config)
    cut = tuple(
        dataclasses.replace(s, memory=dataclasses.replace(s.memory, zero=zero)) for s in plan.stages
    )
    return dataclasses.replace(plan, stages=cut)


@contextmanager
def running(graph: OpGraph, plan: Plan, batch: torch.Tensor) -> Iterator[RayRun]:
    """A run on actors."""
    specs = compile_plan(graph, plan, optimizer=default_optimizer, threads=1)
    with RayRun(specs, feed=partial(RepeatFeed, tensors=[batch])) as run:
        yield run


def cost(graph: OpGraph, batch: torch.Tensor, folder: Path) -> dict[str, Any]:
    """How long training stands still, and what writing beside it does to steps."""
    plan = plan_for(graph, 2, 1, 0)
    store = CheckpointStore(folder / "cost", CheckpointConfig(num_to_keep=1))
    quiet: list[float] = []
    beside: list[float] = []
    begun = []
    with running(graph, plan, batch) as run:
        run.train(0, 1)
        store.make_ready(run)
        run.train(1, 1)
        for at in range(4):
            run.train(2 + 4 * at, 2, lambda r: quiet.append(r.seconds))
            began = store.begin(run, TrainState(step=4 + 4 * at), plan)
            assert began is not None
            begun.append(began)
            run.train(4 + 4 * at, 2, lambda r: beside.append(r.seconds))
            store.wait()
    store.close()
    step = sorted(quiet)[len(quiet) // 2]
    found = {
        "parameters": sum(p.numel() for p in LARGE().parameters()),
        "bytes": begun[0].bytes,
        "step_s": step,
        "step_beside_writing_s": sorted(beside)[len(beside) // 2],
        "first_stall_s": begun[0].stall_s,
        "stall_s": sorted(b.stall_s for b in begun[1:])[1],
        "stall_of_20_steps": max(b.stall_s for b in begun) / (EVERY * step),
    }
    print(found, flush=True)
    return found


@dataclasses.dataclass(frozen=True)
class Watch:
    """Asks a rank for its memory: now (after which its peak is counted anew), or the peak since."""

    peak: bool

    def __call__(self, _: RankState) -> int:
        """Bytes of resident memory."""
        if self.peak:
            return peak_resident()
        count_peak_anew()
        return resident()


def load(graph: OpGraph, batch: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Saved by so many ranks, taken by so many others."""
    wide, two, one = (plan_for(graph, 2, 2, 1), plan_for(graph, 2, 1, 0), plan_for(graph, 1, 1, 0))
    cut = plan_for(graph, 1, 4, 3)
    found = {}
    for name, before, after in (("4 to 2", wide, two), ("1 to 4", one, cut)):
        store = CheckpointStore(folder / name.replace(" ", "-"))
        with running(graph, before, batch) as run:
            run.train(0, 1)
            store.begin(run, TrainState(step=1), before)
            [saved] = store.wait()
        store.close()
        found[name] = _loaded(graph, after, batch, saved)
        print(name, found[name], flush=True)
    return found


def _loaded(graph: OpGraph, plan: Plan, batch: torch.Tensor, saved: Checkpoint) -> dict[str, Any]:
    with running(graph, plan, batch) as run:
        parameters = [m["parameters"] for m in run.memory()]
        before = run.call("visit", Watch(peak=False))
        began = time.perf_counter()
        saved.restore(run)
        seconds = time.perf_counter() - began
        peaks = run.call("visit", Watch(peak=True))
        shares = [m["parameters"] + m["optimizer"] for m in run.memory()]
    ratios = [
        (held + peak - start) / share
        for held, peak, start, share in zip(parameters, peaks, before, shares, strict=True)
    ]
    return {"seconds": seconds, "share_bytes": max(shares), "peak_of_share": max(ratios)}


def main() -> int:
    """Measures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", choices=("resume", "kills", "cost", "load"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if args.only in (None, "kills"):
        found["kills"] = kills(args.kills)
    if args.only in (None, "resume"):
        found["resume"] = resume(args.seeds)
    if args.only in (None, "cost", "load"):
        from raypar.train.session import start_private_ray

        graph, batch = large()
        with start_private_ray(4), tempfile.TemporaryDirectory() as folder:
            for name, measure in (("cost", cost), ("load", load)):
                if args.only in (None, name):
                    found[name] = measure(graph, batch, Path(folder))
    missed = misses(summary(found))
    print("ok" if not missed else "MISSED: " + "; ".join(missed))
    if args.json:
        body = {
            **summary(found),
            **found,
            "missed": missed,
            **about(),
        }
        write_figures(args.json, body)
    return 1 if missed else 0


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that have targets."""
    told: dict[str, Any] = {}
    if "kills" in found:
        bad = sum(found["kills"][name] for name in ("broken", "lost", "other_losses"))
        told["kills_survived"] = bad == 0
    if "resume" in found:
        told["same_plan_equal"] = found["resume"]["same_plan_equal"] == found["resume"]["cases"]
        told["other_plan_off"] = found["resume"]["other_plan_off"]
    if "cost" in found:
        told["stall_of_20_steps"] = found["cost"]["stall_of_20_steps"]
    if "load" in found:
        told["peak_of_share"] = max(line["peak_of_share"] for line in found["load"].values())
    return told


def misses(told: dict[str, Any]) -> list[str]:
    """The targets that are missed, in words."""
    limits = {"other_plan_off": CLOSE, "stall_of_20_steps": STALL, "peak_of_share": PEAK}
    return [
        f"{name} is {value}"
        for name, value in told.items()
        if value is False or (name in limits and not value <= limits[name])
    ]


if __name__ == "__main__":
    sys.exit(main())
