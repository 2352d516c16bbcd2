"""One table of what the GPU parts found: FOLDER/*.json into FOLDER/README.md.

python release/gpu/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def parts(folder: Path) -> list[dict[str, Any]]:
    """What the parts wrote, by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [part for part in found if isinstance(part, dict) and "part" in part]


def table(found: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["# Figures of one GPU", ""]
    for text in dict.fromkeys(_machine(part["machine"]) for part in found):
        lines.append(text)
    if any(part["smoke"] for part in found):
        lines.append("")
        lines.append("**A smoke run: its sizes are tiny, and its figures mean nothing.**")
    lines += ["", "| part | figure | found | target | |", "|---|---|---|---|---|"]
    for part in found:
        for target in part["targets"]:
            mark = "met" if target["met"] else "**missed**"
            lines.append(
                f"| {part['part']} | {target['name']} | {target['value']:.4g} | "
                f"{target['bound']} | {mark} |"
            )
    speeds = [part for part in found if part["part"].startswith("speed")]
    if speeds:
        lines += ["", *_speed(speeds)]
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    words = [f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}"]
    if "cuda" in machine:
        words.append(
            f"CUDA {machine['cuda']}, driver {machine['driver']}, NCCL {machine['nccl']}, "
            f"{machine['memory'] / 1e9:.0f} GB"
        )
    return f"{'; '.join(words)}; {machine['when'][:10]}, commit {machine['commit'][:12]}."


def _speed(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | system | step, ms | middle half | tokens/s | TFLOP/s | GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in found:
        for row in part["figures"]["systems"]:
            name = f"| {part['figures']['shape']} | {row['system']} "
            if "failed" in row:
                lines.append(f"{name}| {row['failed'].replace('|', '/')} | | | | |")
                continue
            step = row["step_s"]
            lines.append(
                f"{name}| {step['median'] * 1e3:.2f} | {step['low'] * 1e3:.2f} to "
                f"{step['high'] * 1e3:.2f} | {row['tokens_per_s']:.0f} | {row['tflops']:.1f} | "
                f"{row['peak_bytes'] / 1e9:.1f} |"
            )
    return lines


def main() -> int:
    """Writes and prints the table; returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: python release/gpu/table.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    found = parts(folder)
    if not found:
        print(f"{folder} holds no part's JSON file: run release/gpu/run_all.sh first")
        return 1
    text = table(found)
    (folder / "README.md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
