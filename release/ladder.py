"""How much faster a ladder of plans is than planning every size for itself.

    python release/ladder.py [--layers 24] [--sizes 8..64:8] [--device A100] [--planner alpa]
                             [--json FILE]

A GPT (width 2048, 16 heads, 1024 tokens, 64 sequences; captured on the meta device) on nodes of 8
devices. Alone, every size captures the model and searches anew; the ladder captures once and shares
what it works out. Processor seconds of this process are compared, captures included, and the steps
that are predicted for the plans of both. Prints a table; the JSON has the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from examples.models import gpt
from raypar import Cluster, OpGraph, SearchConfig, capture
from raypar.search.ladder import ladder, sizes_of
from release._figures import write_figures

WIDTH, HEADS, TOKENS, VOCAB, BATCH, PER_NODE = 2048, 16, 1024, 51200, 64, 8


def captured(layers: int) -> OpGraph:
    tokens = torch.empty(BATCH, TOKENS, dtype=torch.long, device="meta")
    return capture(lambda: gpt(layers, WIDTH, HEADS, TOKENS, VOCAB), (tokens, tokens))


def compared(layers: int, sizes: tuple[int, ...], device: str, planner: str) -> dict[str, Any]:
    """Processor seconds of both ways, and how the plans compare."""
    cluster = Cluster.virtual(-(-max(sizes) // PER_NODE), PER_NODE, device)
    config = SearchConfig(planner=planner, trials="auto" if planner != "optuna" else 16)
    rows = []
    for size in sizes:
        began = time.process_time()
        (rung,) = ladder(captured(layers), cluster, (size,), config).rungs
        rows.append({"devices": size, "step_s": rung.step_s, "cpu_s": time.process_time() - began})
        print(f"alone {size}: {rows[-1]['cpu_s']:.1f} CPU s, step {rung.step_s:.4f} s", flush=True)
    began = time.process_time()
    climbed = ladder(captured(layers), cluster, sizes, config)
    together = time.process_time() - began
    for row, rung in zip(rows, climbed.rungs, strict=True):
        row["ladder_step_s"] = rung.step_s
    print(climbed.text())
    alone = sum(row["cpu_s"] for row in rows)
    return {
        "layers": layers,
        "device": device,
        "planner": planner,
        "alone_cpu_s": alone,
        "ladder_cpu_s": together,
        "speed_up": alone / together,
        "worst_step_ratio": max(row["ladder_step_s"] / row["step_s"] for row in rows),
        "sizes": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sizes", default="8..64:8")
    parser.add_argument("--device", default="A100")
    parser.add_argument("--planner", default="alpa")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sizes_of(given.sizes, 1 << 20)
    found = compared(given.layers, sizes, given.device, given.planner)
    print(
        f"alone {found['alone_cpu_s']:.1f} CPU s, ladder {found['ladder_cpu_s']:.1f} CPU s: "
        f"{found['speed_up']:.2f} times faster; its steps take at most "
        f"{found['worst_step_ratio']:.4f} of those alone"
    )
    if given.json is not None:
        write_figures(given.json, found)


if __name__ == "__main__":
    main()
