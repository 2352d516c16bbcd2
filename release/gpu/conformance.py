"""The conformance suite of `raypar.testing.comm` over NCCL, with 1, 2 and 4 ranks on one GPU.

    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 python release/gpu/conformance.py [--out DIR]
    python release/gpu/conformance.py --device cpu --smoke     # sockets: to try the script itself

The suite runs as it is, and again with its cases of three ranks on one and on four. With one rank
there is nobody to send to: just the cases that a rank can do alone run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raypar.testing.comm import Case, CommConformance
from release.gpu import kit

SIZES = (3, 1, 2, 4)
ALONE = ("test_size_one", "test_all_reduce_odd_forms", "test_gather_scatter",
         "test_background_gather_scatter", "test_barrier_waits")  # fmt: skip
THREE = ("test_subgroups", "test_dead_peer", "test_abort_of_a_subgroup")
"""Cases that are written for three ranks."""
PAIRS = ("test_both_directions_large", "test_all_reduce")
"""Cases that name their own number of ranks: once is enough."""
SMOKE = ("test_all_reduce_odd_forms", "test_every_dtype")


class Here(CommConformance):
    """The suite on ranks that share a device."""

    def __init__(self, ranks: kit.Ranks, size: int, device: str) -> None:
        self.ranks, self.size, self.device = ranks, size, device
        on_gpu = device == "cuda"
        self.free_order, self.stream_ordered = not on_gpu, on_gpu

    def run(self, case: Case, *, size: int = 3, timeout_s: float = 20.0) -> list[Any]:
        """Runs a case; three ranks are as many as the sweep says."""
        return self.ranks.run(case, self.size if size == 3 else size, timeout_s)


def chosen(size: int, smoke: bool) -> list[str]:
    """The cases of one number of ranks."""
    names = [n for n in vars(CommConformance) if n.startswith("test_")]
    if size == 1:
        names = [n for n in names if n in ALONE]
    elif size != 3:
        names = [n for n in names if n not in (*THREE, *PAIRS, "test_size_one")]
    return [n for n in names if not smoke or n in (*SMOKE, "test_size_one")]


def main() -> int:
    """Runs the suite; returns the exit code."""
    options = kit.parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    budget = kit.Budget()
    with kit.Ranks(max(SIZES), options.device) as ranks:
        for size in SIZES:
            for name in chosen(size, options.smoke):
                rows.append(_one(Here(ranks, size, options.device), name, budget))
                print(f"{size} ranks {name}: {rows[-1]['error'] or 'passed'}", flush=True)
    failed = sum(row["error"] is not None for row in rows)
    return kit.write(
        options, "conformance", {"cases": rows}, [kit.Target("failed cases", failed, "== 0")]
    )


def _one(suite: Here, name: str, budget: kit.Budget) -> dict[str, Any]:
    began, error = time.perf_counter(), None
    try:
        if not budget.left:
            raise RuntimeError("no time was left")
        getattr(suite, name)()
    except Exception as problem:  # whatever it is, the other cases still run
        error = f"{type(problem).__name__}: {problem}"
    return {
        "ranks": suite.size,
        "case": name,
        "error": error,
        "seconds": round(time.perf_counter() - began, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
