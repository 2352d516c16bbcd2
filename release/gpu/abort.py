"""A collective that one rank never joins: how long until every rank is free again?

    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 python release/gpu/abort.py [--out DIR]
    python release/gpu/abort.py --device cpu --smoke

In `hung collective` all ranks but the last join an all-reduce, while the last waits for a message
that nobody sends: with NCCL both are kernels that spin on the device. In `told` one rank aborts on
its own account. Every rank's time runs from its call until it has been told and its device is idle.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from raypar.comm.group import Group, TensorSpec
from raypar.errors import CommError
from release.gpu import kit

DEADLINE_S = 3.0
GRACE_S = 1.0


def hung(group: Group, device: str, told: bool) -> dict[str, Any]:
    """One rank: hangs, and says what freed it and when."""
    last = group.size - 1
    warm = torch.ones(4, device=device)
    group.all_reduce(warm).wait()
    # The pair that will hang is connected before the clock starts, as in a run that has begun.
    if group.rank == last:
        group.isend(warm, 0, "warm").wait()
    elif group.rank == 0:
        group.irecv(TensorSpec((4,), torch.float32), last, "warm").wait()
    if group.rank == 0 and group.size > 1:
        group.isend(warm, last, "warm back").wait()
    elif group.rank == last and group.size > 1:
        group.irecv(TensorSpec((4,), torch.float32), 0, "warm back").wait()
    kit.settle(device)
    group.barrier()
    began = time.monotonic()
    text = ""
    try:
        if group.rank == last:
            group.irecv(TensorSpec((1 << 20,), torch.float32), 0, "never sent").wait()
        else:
            work = group.all_reduce(torch.ones(1 << 20, device=device), name="hung")
            if told and group.rank == 0:
                time.sleep(0.5)
                group.abort("a test")
            work.wait()
        kit.settle(device)  # NCCL: the host was not blocked, the device is
        while time.monotonic() - began < 60.0:  # and the next call is refused
            group.all_reduce(torch.ones(1, device=device)).wait()
            kit.settle(device)
            time.sleep(0.01)
    except (CommError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    kit.settle(device)
    freed = time.monotonic() - began
    usable = float(torch.ones(8, device=device).sum())
    return {"rank": group.rank, "seconds": freed, "told": text, "usable": usable == 8.0}


def main() -> int:
    """Hangs groups of 2 and 4 ranks; returns the exit code."""
    options = kit.parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    sizes = (2,) if options.smoke else (2, 4)
    with kit.Ranks(max(sizes), options.device) as ranks:
        for size in sizes:
            for told in (False, True):
                case = functools.partial(hung, device=options.device, told=told)
                found = ranks.run(case, size, DEADLINE_S)
                kind = "told" if told else "hung collective"
                rows += [{"case": kind, "ranks": size, **row} for row in found]
                for row in rows[-size:]:
                    print(
                        f"{kind}, rank {row['rank']} of {size}: free after {row['seconds']:.2f} s"
                    )
                    print(f"  {row['told']}", flush=True)
    worst = {
        k: max(r["seconds"] for r in rows if r["case"] == k) for k in {r["case"] for r in rows}
    }
    lost = sum(not row["told"] or not row["usable"] for row in rows)
    return kit.write(
        options,
        "abort",
        {"deadline_s": DEADLINE_S, "rows": rows},
        [
            kit.Target("s to free all of a hung collective", worst["hung collective"],
                       f"<= {DEADLINE_S + GRACE_S}"),
            kit.Target("s to free all when told", worst["told"], f"<= {0.5 + GRACE_S}"),
            kit.Target("ranks not told, or without their device", lost, "== 0"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
