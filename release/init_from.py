"""Does a model that no rank could hold begin from a file, and train?

    python release/init_from.py [--json FILE] [--ranks N] [--layers N] [--width N]

A float32 model of 1.2 GB is written as one safetensors file, tensor by tensor; 10 actors of a
private Ray, one a pipeline stage, begin with it and train two steps. Of each rank is told how far
its peak resident memory grew while it was built, and until the end; what the same run grows by
with a model of the same form whose tensors have a few bytes (programs, imports, buffers) is taken
off. The bounds: while it is built its own part, the largest tensor and 32 MiB; in all a quarter of
the model, gradients included. The losses must be those of one process that loaded the file. Exits
with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.comm.group import Group
from raypar.stages.compile import compile_plan
from raypar.stages.remote import RayRun
from raypar.stages.spec import RankSpec, StepReport
from raypar.stages.worker import Runner, default_runner
from raypar.testing.backends import RepeatFeed
from raypar.train.checkpoint.image import write_tensors
from raypar.train.weights import initial_weights
from release._figures import about, write_figures
from release._resident import count_peak_anew, peak_resident, resident

BATCH, STEPS, TINY = 4, 2, 8
SLACK = 32 << 20
SHARE_OF_MODEL, CLOSE = 0.25, 1e-5


class Tower(nn.Module):
    """Residual layers of one width, with a mean square as its loss."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        for layer in self.layers:
            x = x + 0.1 * functional.gelu(layer(x))
        return x.square().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    """No state beside the parameters."""
    return torch.optim.SGD(params, lr=0.1)


def write(path: Path, layers: int, width: int) -> None:
    """Random weights, of which one tensor at a time is in memory."""
    with torch.device("meta"):
        model = Tower(layers, width)
    forms = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)

    def fill(_: str, room: torch.Tensor) -> None:
        room.normal_(0, width**-0.5, generator=generator)

    write_tensors(path, forms, fill)


class Watched:
    """A rank's runner that also tells how its process grew."""

    def __init__(self, spec: RankSpec, world: Group) -> None:
        self._before = resident()
        count_peak_anew()
        self._runner: Runner = default_runner(spec, world)
        self._built = peak_resident()

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        """See `Runner.step`."""
        return self._runner.step(step, inputs)

    def growth(self) -> tuple[int, int]:
        """Bytes of growth until it was built, and until now."""
        return self._built - self._before, peak_resident() - self._before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def trained(path: Path, layers: int, width: int, ranks: int) -> dict[str, Any]:
    """What a run that begins with the file does, and how its ranks grow."""
    model_fn = partial(Tower, layers, width)
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(2))
    graph = capture(model_fn, batch)
    plan = make_plan(graph, Cluster.local(ranks), SearchConfig(stages=ranks, microbatches=1))
    initial, _ = initial_weights(path, graph.model)
    specs = compile_plan(graph, plan, optimizer=sgd, threads=1, initial=initial)
    losses: list[float] = []
    began = time.perf_counter()
    feed = partial(RepeatFeed, tensors=[batch])
    with RayRun(specs, feed=feed, runner=Watched, start_timeout_s=1200.0) as run:
        seconds = time.perf_counter() - began
        run.train(0, STEPS, lambda result: losses.append(float(result.loss or 0.0)))
        growth = run.call("growth")
        own = [m["parameters"] for m in run.memory()]
    return {"losses": losses, "growth": growth, "own": own, "start_s": seconds}


def alone(path: Path, layers: int, width: int) -> list[float]:
    """The losses of one process that loads the file."""
    model = Tower(layers, width)
    model.load_state_dict(load_file(path))
    optimizer = sgd(model.parameters())
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(folder: Path, layers: int, width: int, ranks: int) -> dict[str, Any]:
    """The large model beside the small one of its form."""
    found: dict[int, dict[str, Any]] = {}
    for size in (TINY, width):
        write(folder / f"{size}.safetensors", layers, size)
        found[size] = trained(folder / f"{size}.safetensors", layers, size, ranks)
        print(size, found[size], flush=True)
    small, large = found[TINY], found[width]
    path = folder / f"{width}.safetensors"
    expected = alone(path, layers, width)
    whole, largest = path.stat().st_size, 4 * width * width
    both = list(zip(large["growth"], small["growth"], large["own"], strict=True))
    return {
        "whole_bytes": whole,
        "largest_tensor_bytes": largest,
        "ranks": ranks,
        "start_s": large["start_s"],
        "own_bytes": large["own"],
        "growth_built_bytes": [mine[0] - base[0] for mine, base, _ in both],
        "growth_trained_bytes": [mine[1] - base[1] for mine, base, _ in both],
        "growth_of_form_bytes": small["growth"],
        "targets": {
            "built_over_allowed": max(
                (mine[0] - base[0]) / (own + largest + SLACK) for mine, base, own in both
            ),
            "trained_over_model": max((mine[1] - base[1]) / whole for mine, base, _ in both),
            "losses_off": max(
                abs(a - b) / abs(b) for a, b in zip(large["losses"], expected, strict=True)
            ),
        },
    }


def main() -> int:
    """Measures; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=10)
    parser.add_argument("--layers", type=int, default=70)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from raypar.train.session import start_private_ray

    with start_private_ray(max(args.ranks, 2)), tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.layers, args.width, args.ranks)
    told = found["targets"]
    limits = {
        "built_over_allowed": 1.0,
        "trained_over_model": SHARE_OF_MODEL,
        "losses_off": CLOSE,
    }
    missed = [f"{name} is {told[name]:.4g}" for name in limits if not told[name] <= limits[name]]
    print(json.dumps(found, indent=1))
    print("ok" if not missed else "MISSED: " + "; ".join(missed))
    if args.json:
        body = {
            **found,
            **about(),
        }
        write_figures(args.json, body)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
