"""What a rank's own part of a model costs to build, beside building the whole.

    python release/materialise.py [--models tower,gpt2] [--parts 4] [--json FILE]

Every line is one subprocess of its own: the growth of the peak resident memory while one rank's
parts (every parameter cut `parts` ways along its longest dim that divides, rank 1 of them) are made
by `materialise`, and the same for the model built whole. The bound is 1.3 times the rank's own part
plus the largest module. Times are CPU seconds of one thread. Digests of the two must agree. Exits
with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from raypar.graph.capture import build_model
from raypar.sharding.spec import S, ShardingSpec
from raypar.stages.materialise import Part, materialise
from release._resident import count_peak_anew, peak_resident, resident

SEED = 7
RANK = 1
ALLOWED_TIMES_SHARD = 1.3
ALLOWED_SLOWDOWN = 1.5


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))


class Tower(nn.Module):
    """A GPT as most are written: default inits, then an `apply`, then scaling by depth."""

    def __init__(self, width: int = 1280, depth: int = 14, vocabulary: int = 16_000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("down.weight"):
                p.data.div_((2 * depth) ** 0.5)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class Plain(nn.Module):
    """The same layers as torch's own constructors leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(1280) for _ in range(14))


def gpt2() -> nn.Module:
    """GPT-2 large's width with fewer layers, as Hugging Face builds and initialises it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1280, n_head=20, n_layer=12))


def truncated() -> nn.Module:
    """A vision transformer's initialisation: the draws depend on what was drawn."""
    model = Plain()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tower": Tower,
    "plain": Plain,
    "gpt2": gpt2,
    "truncated": truncated,
}


def wanted_of(model: nn.Module, parts: int) -> dict[str, Part]:
    """Every parameter's part on rank 1."""
    found: dict[str, Part] = {}
    for name, p in model.named_parameters():
        dims = [d for d in range(p.dim()) if p.shape[d] % parts == 0]
        if not dims:
            found[name] = None
            continue
        spec = ShardingSpec((S(max(dims, key=lambda d: p.shape[d])),))
        found[name] = spec.ranges(p.shape, (parts,), (RANK,))
    return found


def largest_module(model: nn.Module) -> int:
    """Bytes of the largest module's own parameters."""
    return max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())


def digest(tensors: dict[str, torch.Tensor]) -> str:
    seen = hashlib.blake2b()
    for name in sorted(tensors):
        seen.update(name.encode())
        seen.update(tensors[name].detach().contiguous().numpy().tobytes())
    return seen.hexdigest()[:16]


def measure(name: str, parts: int, how: str) -> dict[str, Any]:
    """In a fresh process: builds a rank's parts (``parts``), or the whole model (``whole``)."""
    torch.set_num_threads(1)
    model_fn = MODELS[name]
    skeleton = build_model(model_fn, on_meta=True)
    wanted = wanted_of(skeleton, parts)
    # Warm up imports and caches, so that the growth is the model's.
    materialise(lambda: nn.Linear(300, 300), 0, {"weight": None})
    gc.collect()
    before = resident()
    count_peak_anew()
    start = time.process_time()
    if how == "parts":
        made = materialise(model_fn, SEED, wanted)
        seconds, peak = time.process_time() - start, peak_resident()
        tensors: dict[str, torch.Tensor] = dict(made.params)
        note = made.note
    else:
        torch.manual_seed(SEED)
        model = model_fn()
        seconds, peak, note = time.process_time() - start, peak_resident(), None
        tensors = dict(materialise(model, SEED, wanted).params)
    return {
        "growth": peak - before,
        "seconds": seconds,
        "own": sum(t.nbytes for t in tensors.values()),
        "whole": sum(p.nbytes for p in skeleton.parameters()),
        "largest": largest_module(skeleton),
        "note": note,
        "digest": digest(tensors),
    }


def in_subprocess(name: str, parts: int, how: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", how, "--models", name, "--parts", str(parts)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, parts: int) -> tuple[dict[str, Any], bool]:
    """One line of the report, and whether it keeps its bounds."""
    own, whole = (in_subprocess(name, parts, how) for how in ("parts", "whole"))
    allowed = ALLOWED_TIMES_SHARD * own["own"] + own["largest"]
    slowdown = own["seconds"] / whole["seconds"]
    good = (
        own["growth"] <= allowed
        and slowdown <= ALLOWED_SLOWDOWN
        and own["digest"] == whole["digest"]
        and own["note"] is None
    )
    mb = 1e-6
    print(
        f"{name:<10} whole {own['whole'] * mb:6.0f} MB, own part {own['own'] * mb:5.0f}, largest "
        f"module {own['largest'] * mb:4.0f}, allowed {allowed * mb:5.0f}; peak growth "
        f"{own['growth'] * mb:5.0f} MB (built whole {whole['growth'] * mb:5.0f}); "
        f"{own['seconds']:5.2f} s against {whole['seconds']:5.2f} s: {slowdown:.2f}; bits "
        f"{'equal' if own['digest'] == whole['digest'] else 'DIFFER'}"
        f"{'' if own['note'] is None else '; ' + own['note']}  {'ok' if good else 'BROKEN'}",
        flush=True,
    )
    line = {"model": name, "parts": parts, "allowed": allowed, "own": own, "whole": whole}
    return line, good


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "targets": {
            "memory_over_allowed": max(x["own"]["growth"] / x["allowed"] for x in lines),
            "seconds_over_whole": max(x["own"]["seconds"] / x["whole"]["seconds"] for x in lines),
            "bits_equal": all(x["own"]["digest"] == x["whole"]["digest"] for x in lines),
        },
        "models": lines,
    }


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--models", default=",".join(MODELS))
    reader.add_argument("--parts", type=int, default=4)
    reader.add_argument("--json", type=Path)
    reader.add_argument("--measure", choices=("parts", "whole"), help=argparse.SUPPRESS)
    options = reader.parse_args()
    if options.measure:
        print(json.dumps(measure(options.models, options.parts, options.measure)))
        return 0
    lines, fine = [], True
    for name in options.models.split(","):
        line, good = compare(name, options.parts)
        lines.append(line)
        fine = fine and good
    if options.json:
        options.json.write_text(json.dumps(_summary(lines), indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
