"""Plans on CUDA ranks over cupy NCCL, without Ray: the law, and the time of a step.

    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 python release/gpu/check.py [--json FILE]
    python release/gpu/check.py --device cpu --smoke     # over sockets, to try the script itself

Several ranks share one GPU, which NCCL 2.30 or newer lets them. Every plan trains three AdamW
steps in float64 and is compared with eager PyTorch on the CPU; exits 1 on a difference.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.multiprocessing as mp

from raypar.comm.registry import get_backend
from raypar.comm.rendezvous import Rendezvous
from raypar.compat import pytree
from raypar.graph.capture import capture
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.plan import plan
from raypar.stages.batch import shard_batch
from raypar.stages.compile import compile_plan
from raypar.stages.consolidate import assemble
from raypar.stages.engines import ENGINES
from raypar.stages.interpreter import RankRunner
from raypar.stages.spec import Engine, RankSpec
from raypar.testing import models
from raypar.testing.equivalence import (
    RunRecord,
    compare,
    default_optimizer,
    reference_run,
    tolerance,
)
from release.gpu import kit

STEPS = 3
PLANS: tuple[dict[str, Any], ...] = (
    {"stages": 1, "replicas": 1, "microbatches": 1},
    {"stages": 1, "replicas": 2, "microbatches": 2},
    {"stages": 2, "replicas": 1, "microbatches": 4, "schedule": "1f1b"},
    {"stages": 2, "replicas": 1, "microbatches": 4, "schedule": "zero_bubble_h1"},
    {"stages": 4, "replicas": 1, "microbatches": 4, "schedule": "interleaved_1f1b", "chunks": 2},
    {"stages": 2, "replicas": 2, "microbatches": 2, "schedule": "gpipe", "recompute": "selective"},
    {"stages": 1, "replicas": 1, "tensor": 2, "microbatches": 2, "zero": 0},
    {"stages": 2, "replicas": 1, "tensor": 2, "microbatches": 2, "zero": 2},
    {"stages": 1, "replicas": 2, "tensor": 2, "microbatches": 2, "zero": 3},
)


def run_rank(rank: int, specs: list[RankSpec], tensors: list[Any], address: Any, box: Any) -> None:
    """One rank: `STEPS` steps, then its reports, gradients and state go into the queue."""
    spec = specs[rank]
    torch.set_num_threads(1)
    if spec.accelerator:
        torch.cuda.set_device(0)
    backend: Any = get_backend("nccl" if spec.accelerator else "gloo")
    world = backend.create("check", rank, len(specs), address)
    runner = RankRunner(spec, world)
    inputs = shard_batch(spec, tensors)
    seconds, reports, gradients = [], [], []
    for step in range(STEPS):
        began = time.perf_counter()
        reports.append(runner.step(step, inputs))
        seconds.append(time.perf_counter() - began)
        gradients.append({k: v.numpy() for k, v in runner.gradients().items()})
    state = {k: v.numpy() for k, v in runner.state().items()}
    box.put((rank, [r.loss for r in reports], gradients, state, min(seconds)))
    world.barrier()
    runner.close()


def run(specs: list[RankSpec], tensors: list[Any]) -> tuple[RunRecord, float]:
    """Trains on one process per rank; returns the record and the slowest rank's best step."""
    context = mp.get_context("spawn")
    box = context.Queue()
    meeting = Rendezvous()
    ranks = [
        context.Process(target=run_rank, args=(r, specs, tensors, meeting.address, box))
        for r in range(len(specs))
    ]
    for process in ranks:
        process.start()
    record = RunRecord([0.0] * STEPS, [{} for _ in range(STEPS)], {})
    slowest = 0.0
    states: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
    parts: list[list[dict[str, torch.Tensor]]] = [[{} for _ in ranks] for _ in range(STEPS)]
    for _ in ranks:
        rank, losses, gradients, state, seconds = box.get(timeout=180)
        slowest = max(slowest, seconds)
        states[rank] = {k: torch.from_numpy(v) for k, v in state.items()}
        for step in range(STEPS):
            record.losses[step] += losses[step] or 0.0
            found = {k: torch.from_numpy(v) for k, v in gradients[step].items()}
            parts[step][rank] = found
    record.gradients = [assemble(specs, step) for step in parts]
    record.state_dict = assemble(specs, states)
    for process in ranks:
        process.join(30)
    meeting.close()
    return record, slowest


def check(
    name: str, device: str, plans: Sequence[dict[str, Any]], engine: Engine
) -> list[dict[str, Any]]:
    """Every one of some plans that fits a zoo model, against eager PyTorch."""
    case = models.case(name)
    batch = case.batch(0, 8)
    graph = capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    rows = []
    for options in plans:
        if options["replicas"] > graph.max_replicas:
            continue
        chosen = plan(graph, Cluster.local(4), SearchConfig(**options))
        specs = compile_plan(
            graph,
            chosen,
            optimizer=default_optimizer,
            keep_gradients=True,
            accelerator=device == "cuda",
            engine=engine,
        )
        found, seconds = run(specs, tensors)
        wanted = reference_run(graph, batch, chosen)
        # Aliases of tied parameters are the state dict's business, not the ranks'.
        wanted.state_dict = {k: v for k, v in wanted.state_dict.items() if k in found.state_dict}
        found.state_dict = {k: v for k, v in found.state_dict.items() if k in wanted.state_dict}
        wrong = compare(found, wanted, tolerance(graph))
        print(
            f"{name} {options}: {len(wrong)} differences, step {seconds * 1e3:.1f} ms", flush=True
        )
        for line in wrong[:3]:
            print(f"  {line}")
        rows.append({"model": name, **options, "differences": len(wrong), "step_s": seconds})
    return rows


def main() -> int:
    """Runs the checks; returns the exit code."""
    warnings.filterwarnings("ignore")
    parser = kit.parser(__doc__)
    parser.add_argument("--models", default="gpt,cnn,llama_own,moe_dense")
    parser.add_argument("--plans", help="numbers of the plans to run; default: all")
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    options = parser.parse_args()
    names = ["mlp"] if options.smoke else options.models.split(",")
    every = range(len(PLANS))
    numbers = [int(n) for n in options.plans.split(",")] if options.plans else list(every)
    numbers = [2] if options.smoke else numbers
    rows = []
    for name in names:
        rows += check(name, options.device, [PLANS[n] for n in numbers], options.engine)
    wrong = sum(row["differences"] for row in rows)
    part = "equivalence" if options.engine == "eager" else f"equivalence {options.engine}"
    targets = [kit.Target("differences", wrong, "== 0")]
    return kit.write(options, part, {"rows": rows}, targets)


if __name__ == "__main__":
    sys.exit(main())
