"""The law in full: every plan trains exactly like the unsplit model.

    python release/equivalence.py [--models gpt,cnn] [--seeds 0:20] [--backend local|ray]
                                  [--meshes 2,4,2x2,2x2x2] [--skip-extras] [--json FILE]

For every model of the zoo and every seed a random plan on 4 devices trains 3 AdamW steps in float64
(SGD for models that compute some ops in float32). Loss, every gradient of every step, parameters
and buffers are compared with an eager PyTorch loop that knows nothing of raypar; models with
dropout, whose masks are raypar's own, with the one-stage plan. A model whose result depends on how
its batch is cut (batch norm, expert capacity) is compared with eager training over the same
microbatches. The bound on max|Δ| per tensor is 1e-9·max(1, max|ref|), or 1e-6 where float32 ops
occur.

With `--meshes` every rank group of every plan gets a mesh drawn from the given shapes (16 devices,
or 8 on Ray, for at most 2 rank groups), every op a random strategy on it, and every stage a random
ZeRO level. Lines are merged into a JSON file of the same backend, seeds and meshes, model by model,
so that a run can be cut in slices.

Then the masks of dropout themselves, and a masked mean over M in {1, 2, 4, 8}. Prints a line per
model and exits with 1 on any difference. `--backend ray` runs on stage actors of a private Ray, by
default gpt, cnn, t5 and moe_sparse.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.equivalence import RunRecord, default_optimizer, gaps, run_graph
from release._figures import about, write_figures

STEPS = 3
SEED = 0
GLOBAL_BATCH = 8
MESH_DEVICES = {"local": 16, "ray": 8}
RAY_MODELS = ("gpt", "cnn", "t5", "moe_sparse")
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """For float32 ops: AdamW would blow their rounding up to whole steps."""
    return torch.optim.SGD(params, lr=1e-2)


@dataclass
class Row:
    """What was found for one model."""

    model: str
    plans: int = 0
    bound: float = 1e-9
    worst: float = 0.0
    stages: set[int] = field(default_factory=set)
    replicas: set[int] = field(default_factory=set)
    microbatches: set[int] = field(default_factory=set)
    schedules: set[str] = field(default_factory=set)
    recompute: set[str] = field(default_factory=set)
    meshes: set[str] = field(default_factory=set)
    unlike: set[str] = field(default_factory=set)
    zero: set[int] = field(default_factory=set)
    sharded_ops: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, plan: Plan, ratio: float) -> None:
        self.plans += 1
        self.worst = max(self.worst, ratio / self.bound)
        self.stages.add(len(plan.stages))
        self.replicas.add(plan.replicas)
        self.microbatches.add(plan.microbatches)
        self.schedules.add(plan.schedule.name)
        self.recompute |= {s.memory.recompute for s in plan.stages}
        forms = ["x".join(str(n) for _, n in s.mesh.inner) or "1" for s in plan.stages]
        self.meshes |= set(forms)
        self.unlike |= {f"{a}→{b}" for a, b in pairwise(forms) if a != b}
        self.zero |= {s.memory.zero for s in plan.stages}
        self.sharded_ops += sum(len(s.sharding) for s in plan.stages)

    def line(self) -> str:
        def text(values: set[Any]) -> str:
            return ",".join(map(str, sorted(values)))

        return (
            f"{self.model:<22} {self.plans:>3} plans  S {text(self.stages):<12} "
            f"D {text(self.replicas):<6} M {text(self.microbatches):<8} "
            f"{len(self.schedules)} schedules {len(self.recompute)} policies  "
            f"meshes {text(self.meshes)} zero {text(self.zero)}, {self.sharded_ops} sharded ops  "
            f"bound {self.bound:.0e}  worst {self.worst:8.1e} of it  {self.seconds:6.1f} s  "
            f"{'ok' if not self.wrong else f'{len(self.wrong)} WRONG'}"
        )

    def as_json(self) -> dict[str, Any]:
        return {k: sorted(v) if isinstance(v, set) else v for k, v in asdict(self).items()}


def eager(case: models.Case, batch: Any, optimizer: Optimizer, parts: int) -> RunRecord:
    """Training as anyone would write it, over `parts` microbatches."""
    torch.manual_seed(SEED)
    model = case.model_fn()
    made = optimizer(model.parameters())
    record = RunRecord()
    for _ in range(STEPS):
        made.zero_grad(set_to_none=True)
        total = 0.0
        for part in case.split(batch, parts):
            loss = case.loss(model, part) / parts
            loss.backward()
            total += loss.item()
        record.losses.append(total)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        record.gradients.append(grads)
        made.step()
    record.state_dict = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return record


def check_model(
    case: models.Case,
    seeds: range,
    cluster: Cluster,
    backend: str,
    meshes: Sequence[tuple[int, ...]] = (),
) -> Row:
    """All plans of one model."""
    row = Row(case.name, bound=1e-6 if case.fp32_ops else 1e-9)
    optimizer: Optimizer = sgd if case.fp32_ops else default_optimizer
    began = time.perf_counter()
    try:
        batch = case.batch(0, GLOBAL_BATCH)
        graph = capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
        if case.feels_microbatches and not graph.feels_microbatches:
            row.wrong.append("the graph does not know that this model feels its microbatches")
        references: dict[int, RunRecord] = {}
        for seed in seeds:
            plan = random_plan(graph, cluster, seed=seed)
            if meshes:
                wide = Cluster.local(MESH_DEVICES[backend])
                plan = random_sharding(graph, plan, wide, seed=seed, meshes=meshes)
            _check_plan(row, case, graph, batch, plan, seed, backend, optimizer, references)
    except Exception as error:
        row.wrong.append(_in_words(error))
    row.seconds = time.perf_counter() - began
    return row


def _check_plan(
    row: Row,
    case: models.Case,
    graph: OpGraph,
    batch: Any,
    plan: Plan,
    seed: int,
    backend: str,
    optimizer: Optimizer,
    references: dict[int, RunRecord],
) -> None:
    parts = plan.microbatches if case.feels_microbatches else 1
    if parts not in references:
        references[parts] = _reference(case, graph, batch, optimizer, parts)
    try:
        found = run_graph(
            graph, batch, plan, optimizer=optimizer, steps=STEPS, backend=backend, seed=SEED
        )
    except Exception as error:
        row.wrong.append(f"seed {seed}: {_in_words(error)}")
        return
    seen = gaps(found, references[parts])
    row.add(plan, max(g.ratio for g in seen))
    row.wrong += [f"seed {seed}: {g.what} {g.text}" for g in seen if not g.ratio <= row.bound]


def _in_words(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first} ({place.filename}:{place.lineno})"


def _reference(
    case: models.Case, graph: OpGraph, batch: Any, optimizer: Optimizer, parts: int
) -> RunRecord:
    if not case.dropout:
        return eager(case, batch, optimizer, parts)
    whole = SearchConfig(stages=1, replicas=1, microbatches=parts)
    single = make_plan(graph, Cluster.local(1), whole)
    return run_graph(graph, batch, single, optimizer=optimizer, steps=STEPS, seed=SEED)


class TwoDropouts(nn.Module):
    """Every sample has rows of its own, so that their gradients are the masks."""

    def __init__(self, samples: int = 64, width: int = 256, p: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Embedding(samples, width)
        self.second = nn.Embedding(samples, width)
        self.drop_first = nn.Dropout(p)
        self.drop_second = nn.Dropout(p)
        self.p = p

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        first = self.drop_first(self.first(samples))
        second = self.drop_second(self.second(samples))
        return (first + second).sum(1).mean()


def mesh_shape(text: str) -> tuple[int, ...]:
    """``2x2`` → (2, 2); ``1`` → no axis."""
    sizes = tuple(int(n) for n in text.split("x"))
    return () if sizes == (1,) else sizes


def two_dropouts() -> nn.Module:
    return TwoDropouts().double()


def check_dropout(seeds: range, cluster: Cluster, backend: str) -> Row:
    """Keep rate within 4 σ; masks differ across step, sample and op; equal across plans."""
    row = Row("dropout masks", bound=1e-9)
    began = time.perf_counter()
    samples, p = 64, TwoDropouts().p
    batch = torch.arange(samples)
    graph = capture(two_dropouts, batch)
    wanted: RunRecord | None = None
    for seed in seeds:
        plan = random_plan(graph, cluster, seed=seed)
        found = run_graph(graph, batch, plan, optimizer=sgd, steps=STEPS, backend=backend)
        wanted = wanted or found
        row.add(plan, max(g.ratio for g in gaps(found, wanted)))
        if row.worst > 1:
            row.wrong.append(f"seed {seed}: other masks than those of seed {seeds[0]}")
        names = ("first.weight", "second.weight")
        masks = torch.stack([torch.stack([g[n] != 0 for n in names]) for g in found.gradients])
        kept = masks.double().mean().item()
        sigma = (p * (1 - p) / masks.numel()) ** 0.5
        if abs(kept - (1 - p)) > 4 * sigma:
            row.wrong.append(f"seed {seed}: keeps {kept:.4f}, not {1 - p} ± {4 * sigma:.4f}")
        if len(masks.flatten(0, 2).unique(dim=0)) != masks.shape[:3].numel():
            row.wrong.append(f"seed {seed}: two masks of step × op × sample are equal")
        scaled = torch.cat([g[n].flatten() for g in found.gradients for n in names])
        if (scaled[scaled != 0] - 1 / (samples * (1 - p))).abs().max() > 1e-15:
            row.wrong.append(f"seed {seed}: kept values are not scaled by 1 / (1 - p)")
    row.seconds = time.perf_counter() - began
    return row


def check_masked_mean(cluster: Cluster, backend: str) -> Row:
    """Uneven padding: the count of the whole batch divides, whatever M and D are."""
    case = models.case("masked_mean")
    row = Row("masked mean, each M", bound=1e-9)
    began = time.perf_counter()
    batch = case.batch(0, GLOBAL_BATCH)
    graph = capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    wanted = eager(case, batch, default_optimizer, 1)
    for parts in (1, 2, 4, 8):
        for replicas in (1, 2):
            if parts * replicas > GLOBAL_BATCH:
                continue
            plan = random_plan(
                graph, cluster, seed=parts, microbatches=parts, replicas=replicas, stages=2
            )
            seen = gaps(run_graph(graph, batch, plan, steps=STEPS, backend=backend), wanted)
            row.add(plan, max(g.ratio for g in seen))
            row.wrong += [f"M={parts}, D={replicas}: {g.what} {g.text}" for g in seen
                          if not g.ratio <= row.bound]  # fmt: skip
    row.seconds = time.perf_counter() - began
    return row


def write_merged(path: Path, body: dict[str, Any]) -> None:
    """Writes the lines of this run, and those of other models that a run like it left there."""
    lines = {line["model"]: line for line in body["models"]}
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == body[key] for key in ("backend", "seeds", "meshes")):
            lines = {**{line["model"]: line for line in before["models"]}, **lines}
    body["models"] = list(lines.values())
    body["equal"] = not any(line["wrong"] for line in lines.values())
    body["plans"] = sum(line["plans"] for line in lines.values())
    write_figures(path, body)


def main() -> int:
    """Runs what the command line asks for; 1 on any difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", help="comma-separated; default: all, or a few on Ray")
    parser.add_argument("--seeds", default=None, help="A:B, default 0:20 (0:4 on Ray)")
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument(
        "--meshes", help="mesh shapes to draw from, as 1,2,4,2x2,2x2x2; default: replicas only"
    )
    parser.add_argument("--skip-extras", action="store_true", help="models only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_ray = args.backend == "ray"
    first, _, end = (args.seeds or ("0:4" if on_ray else "0:20")).partition(":")
    seeds = range(int(first), int(end))
    chosen = args.models.split(",") if args.models else RAY_MODELS if on_ray else models.names()
    torch.set_num_threads(1)
    meshes = [mesh_shape(text) for text in args.meshes.split(",")] if args.meshes else []
    cluster = Cluster.local(2 if meshes else 4)
    rows: list[Row] = []

    def done(row: Row) -> None:
        rows.append(row)
        print(row.line(), *(f"    {w}" for w in row.wrong[:8]), sep="\n", flush=True)

    if on_ray:
        from raypar.train.session import start_private_ray

        session: Any = start_private_ray(8)
    else:
        session = nullcontext()
    with session:
        for name in chosen:
            done(check_model(models.case(name), seeds, cluster, args.backend, meshes))
        if not args.skip_extras:
            few = range(seeds.start, min(seeds.stop, seeds.start + (2 if on_ray else 10)))
            done(check_dropout(few, cluster, args.backend))
            done(check_masked_mean(cluster, args.backend))
    failed = [row.model for row in rows if row.wrong]
    total = sum(row.plans for row in rows)
    print(
        f"{len(rows)} lines, {total} plans on {args.backend}, {sum(r.seconds for r in rows):.0f} s,"
        f" worst {max(r.worst for r in rows):.1e} of its bound: "
        + (f"DIFFERENCES in {', '.join(failed)}" if failed else "all equal")
    )
    if args.json:
        body: dict[str, Any] = {
            "backend": args.backend,
            "seeds": [seeds.start, seeds.stop],
            "meshes": args.meshes,
            **about(),
            "models": [row.as_json() for row in rows],
        }
        write_merged(args.json, body)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
