"""Messages and all-reduce between two processes: raypar against torch's gloo, in one run.

    python release/comm.py --json release/results/comm.json

For every size it prints the median one-way time of a message (half a round trip), and the median
time of an all-reduce with the CPU time it takes per rank. The two kinds are run in turns, so that a
change in the machine's load hits both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from raypar.comm.gloo import GlooGroup
from raypar.comm.group import TensorSpec
from raypar.comm.rendezvous import Address, Rendezvous
from release._figures import write_figures

SIZES = (4, 1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
ROUNDS = 5


def _calls(nbytes: int) -> int:
    """Repetitions in a round: many for small sizes, few for large ones."""
    return max(3, min(100, (32 << 20) // nbytes))


def _timed(call: Callable[[], None], count: int) -> tuple[list[float], float]:
    """Wall seconds of every call, and CPU seconds of this process per call."""
    walls = []
    cpu = time.process_time()
    for _ in range(count):
        began = time.perf_counter()
        call()
        walls.append(time.perf_counter() - began)
    return walls, (time.process_time() - cpu) / count


def measure(rank: int, address: Address, store_port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    group = GlooGroup.create("bench", rank, 2, address)
    store = dist.TCPStore(address.host, store_port, is_master=False, wait_for_workers=False)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("plain", store), rank, 2, timedelta(seconds=60))
    other = 1 - rank
    rows = []
    for nbytes in SIZES:
        tensor = torch.ones(nbytes // 4)
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)

        def mine(tensor: torch.Tensor = tensor, spec: TensorSpec = spec) -> None:
            if rank == 0:
                group.isend(tensor, other, "ping").wait()
                group.irecv(spec, other, "pong").wait()
            else:
                group.irecv(spec, other, "ping").wait()
                group.isend(tensor, other, "pong").wait()

        def theirs(tensor: torch.Tensor = tensor) -> None:
            into = torch.empty_like(tensor)  # raypar's receives allocate too
            if rank == 0:
                gloo.send([tensor], other, 1).wait()
                gloo.recv([into], other, 2).wait()
            else:
                gloo.recv([into], other, 1).wait()
                gloo.send([tensor], other, 2).wait()

        def reduce_mine(tensor: torch.Tensor = tensor) -> None:
            group.all_reduce(tensor).wait()

        def reduce_theirs(tensor: torch.Tensor = tensor) -> None:
            gloo.allreduce([tensor]).wait()

        kinds = {
            "message_raypar": mine,
            "message_gloo": theirs,
            "all_reduce_raypar": reduce_mine,
            "all_reduce_gloo": reduce_theirs,
        }
        walls: dict[str, list[float]] = {kind: [] for kind in kinds}
        cpus: dict[str, list[float]] = {kind: [] for kind in kinds}
        for call in kinds.values():
            call()
        for _ in range(ROUNDS):
            for kind, call in kinds.items():
                tensor.zero_()
                group.barrier()
                wall, cpu = _timed(call, _calls(nbytes))
                walls[kind] += wall
                cpus[kind].append(cpu)
        row: dict[str, float] = {"bytes": nbytes}
        for kind in kinds:
            half = 2 if kind.startswith("message") else 1
            seconds = statistics.median(walls[kind]) / half
            row[f"{kind}_ms"] = seconds * 1e3
            row[f"{kind}_gb_per_s"] = nbytes / seconds / 1e9
            row[f"{kind}_cpu_ms"] = statistics.median(cpus[kind]) / half * 1e3
        rows.append(row)
    group.barrier()
    group.close()
    if rank == 0:
        queue.put(rows)


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        f"{'':>9}  {'message, one way: ms (GB/s)':^35}  {'all-reduce of 2: ms (CPU ms)':^35}",
        f"{'bytes':>9}  {'raypar':>17} {'gloo':>17}  {'raypar':>17} {'gloo':>17}",
    ]
    for row in rows:
        cells = [
            f"{row[f'message_{kind}_ms']:.3f} ({row[f'message_{kind}_gb_per_s']:.2f})"
            for kind in ("raypar", "gloo")
        ] + [
            f"{row[f'all_reduce_{kind}_ms']:.3f} ({row[f'all_reduce_{kind}_cpu_ms']:.2f})"
            for kind in ("raypar", "gloo")
        ]
        lines.append(
            f"{int(row['bytes']):>9}  {cells[0]:>17} {cells[1]:>17}  {cells[2]:>17} {cells[3]:>17}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    server = Rendezvous()
    store = dist.TCPStore(server.address.host, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=measure, args=(rank, server.address, store.port, queue))
        for rank in range(2)
    ]
    load = os.getloadavg()[0]
    for worker in workers:
        worker.start()
    rows = queue.get(timeout=600)
    for worker in workers:
        worker.join()
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": round(load, 2),
    }
    print(table(rows))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if options.json is not None:
        write_figures(options.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
