"""Does what is installed here fit together: torch, cupy, NCCL, the GPU, and what raypar imports?

python release/gpu/env.py [--out DIR]
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from release.gpu import kit

NEEDED = ("numpy", "networkx", "optuna", "highspy", "pydantic", "fsspec", "safetensors", "yaml")
MULTI_RANK = 23000
"""NCCL's version, as it counts, from which on several ranks may share a GPU."""


def main() -> int:
    """Looks; returns the exit code."""
    options = kit.parser(__doc__).parse_args()
    absent = [name for name in (*NEEDED, "ray", "torch") if importlib.util.find_spec(name) is None]
    figures: dict[str, Any] = {"absent": absent}
    print(f"not importable: {', '.join(absent) or 'none'}")
    print("(ray is needed by the part `ray` alone)" if "ray" in absent else "", end="")
    problems = [name for name in absent if name != "ray"]
    if not problems and options.device == "cuda":
        problems += _cuda(figures)
    for problem in problems:
        print(f"problem: {problem}")
    figures["problems"] = problems
    return kit.write(options, "env", figures, [kit.Target("problems", len(problems), "== 0")])


def _cuda(figures: dict[str, Any]) -> list[str]:
    import torch

    from raypar.comm import nccl

    reason = nccl.unavailable_reason()
    if reason is not None:
        return [reason]
    from cupy.cuda import nccl as library

    version = int(library.get_version())
    figures["nccl"] = {"runtime": version, "built_for": int(library.get_build_version())}
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}), NCCL {version}")
    if version < MULTI_RANK:
        return [
            f"NCCL {version} lets one rank use a GPU, and the parts conformance, abort and "
            f"equivalence put several on it: from {MULTI_RANK} on it can. Give run_all.sh a folder "
            "with libnccl.so.2.xz (RAYPAR_GPU_BUNDLES)"
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())
