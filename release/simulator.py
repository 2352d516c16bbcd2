"""The simulator against raypar itself: random plans, predicted and then run.

    python release/simulator.py [--models gpt,cnn,t5,mlp] [--plans 0:40] [--cost analytic|profiled]
                                [--calibration FILE] [--measure time,memory] [--json FILE]

Every plan is drawn by `raypar.testing.random_plan` for 1 to 4 CPU devices on this machine, which
may have fewer cores than that: then ranks share them. In every third one, ops are sharded at random
(`raypar.testing.random_sharding`). Its step time is measured on stage actors of a private Ray, in
steps that no other program disturbs (`release.undisturbed`; on a busy machine there may be none,
and the figure is marked as corrected), its memory in this process: after every instruction of a
step, the distinct storages that each rank holds. Predicted with the
calibration that `raypar probe` keeps for this machine (or `--calibration`): fitted to single
operators, not to these models.

Results are merged into the JSON file plan by plan, so that a run can be cut in slices and taken up
again; `--measure ""` predicts anew for what was measured. Prints a line per plan
and the figures per model; exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import raypar
from raypar.comm.group import Group
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import load_calibration, read_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.schedules.instructions import Instruction
from raypar.search.simulate import Simulation, simulate
from raypar.search.simulation import MOVING
from raypar.stages.compile import compile_plan
from raypar.stages.holdings import Workshop
from raypar.stages.interpreter import RankRunner
from raypar.stages.local import LocalRun
from raypar.stages.spec import RankSpec
from raypar.testing import random_plan, random_sharding
from raypar.testing.backends import RepeatFeed
from release._figures import write_figures
from release.cost_models import CNN, GPT, MLP, T5
from release.ours import raypar_cluster
from release.undisturbed import CountedRun, figure_of, load

RESULTS = Path(__file__).parent / "results" / "simulator.json"
TARGETS = {"mape": 0.15, "spearman": 0.9, "memory": 0.10, "saved": 0.05}
WARM_UP, STEPS, MOST_S = 3, 12, 12.0
PAGE = 4096
SHARDED, MESHES, SHARE = 3, ((), (2,), (4,), (2, 2)), 0.4
"""Every so many plans are sharded, on such meshes, in such a share of the ops that can be."""
BATCH, LENGTH, VOCAB = 16, 48, 512
Row = dict[str, Any]


def gpt() -> nn.Module:
    """Four layers of width 160."""
    return _seeded(GPT, 4, 160, 5, VOCAB, LENGTH)


def t5() -> nn.Module:
    """Two encoder and two decoder layers of width 128."""
    return _seeded(T5, 2, 128, 4, VOCAB, LENGTH)


def cnn() -> nn.Module:
    """Six residual blocks on 16 x 16 images."""
    return _seeded(CNN, 24, 2)


def mlp() -> nn.Module:
    """Eight layers of width 512."""
    return _seeded(MLP, 512, 8)


def _seeded(build: Callable[..., nn.Module], *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return build(*sizes)


def _tokens() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, VOCAB, (BATCH, LENGTH), generator=g) for _ in range(2))


def _images() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 16, 16, generator=g), torch.randint(0, 10, (BATCH,), generator=g)


def _rows() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    size = 32 * BATCH
    return torch.randn(size, 512, generator=g), torch.randint(0, 100, (size,), generator=g)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "gpt": (gpt, _tokens),
    "cnn": (cnn, _images),
    "t5": (t5, _tokens),
    "mlp": (mlp, _rows),
}


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Two states per parameter, all tensors at once."""
    return torch.optim.AdamW(params, lr=1e-4, foreach=True)


@functools.cache
def captured(name: str) -> OpGraph:
    """The graph of a model."""
    model_fn, batch = MODELS[name]
    return raypar.capture(model_fn, batch())


def drawn(name: str, seed: int) -> tuple[Plan, Cluster]:
    """Plan `seed` of a model, on 1 to 4 devices."""
    cluster = Cluster.local(1 + seed % 4)
    most = 8  # more microbatches measure overheads, not work
    sharded = seed % SHARDED == SHARDED - 1 and cluster.n_devices > 1
    drawn_for = Cluster.local(cluster.n_devices // 2) if sharded else cluster
    for attempt in range(100):
        draw = seed + 1000 * attempt
        plan = random_plan(captured(name), drawn_for, seed=draw)
        if plan.microbatches > most:
            continue
        if sharded:
            plan = random_sharding(
                captured(name), plan, cluster, seed=draw, meshes=MESHES, share=SHARE
            )
        return plan, cluster
    raise RuntimeError(f"no plan of {name} with at most {most} microbatches in 100 draws")


# -- measured -------------------------------------------------------------------------------


def measured_step(name: str, plan: Plan) -> Row:
    """Seconds per step on stage actors, and what they rest on."""
    run = CountedRun(captured(name), MODELS[name][1](), plan, adamw, name)
    try:
        steps = run.until_quiet(WARM_UP, STEPS, MOST_S)
    finally:
        run.close()
    found = figure_of(steps)
    return {
        "measured_s": found.seconds,
        "cpu_s": found.cpu,
        "steps": len(steps),
        "quiet": found.quiet,
        "disturbed": found.disturbed,
        "load": load(),
    }


class Watched(RankRunner):
    """Adds up what a rank holds after every instruction."""

    def __init__(self, spec: RankSpec, world: Group, workshop: Workshop) -> None:
        super().__init__(spec, world, workshop=workshop)
        self.most = 0
        for kind, handler in list(self._handlers.items()):
            self._handlers[kind] = functools.partial(self._watched, handler)

    def _watched(self, handler: Callable[[Instruction], None], now: Instruction) -> None:
        handler(now)
        states = [] if self._optimizer is None else self._optimizer.state.values()
        boxes = [*self._saved.values(), *self._halves.values()]
        held = [
            *self._holdings.params.values(), *self._holdings.stored.values(),
            *self._holdings.buffers.values(), *self._gradients.tensors(), *self._values.values(),
            *(t for s in states for t in s.values()), *(t for box in boxes for t in box),
        ]  # fmt: skip
        outside = _storages([*self._inputs.values()])
        found = _storages(held)
        self.most = max(self.most, sum(n for key, n in found.items() if key not in outside))


def _storages(values: Iterable[Any]) -> dict[int, int]:
    tensors = (v.untyped_storage() for v in values if isinstance(v, torch.Tensor))
    return {s.data_ptr(): s.nbytes() for s in tensors}


def measured_memory(name: str, plan: Plan) -> tuple[list[int], dict[int, int]]:
    """Per rank the most bytes held, and per stage the most saved for backward."""
    _, batch = MODELS[name]
    specs = compile_plan(captured(name), plan, optimizer=adamw)
    workshop, runners = Workshop(), []

    def runner(spec: RankSpec, world: Group) -> Watched:
        runners.append(Watched(spec, world, workshop))
        return runners[-1]

    results: list[Any] = []
    feed = functools.partial(RepeatFeed, tensors=list(batch()))
    with LocalRun(specs, feed=feed, runner=runner) as run:
        run.train(0, 2, results.append)
        most = {r.spec.rank: r.most for r in runners}
    saved: dict[int, int] = {}
    for report in results[0].ranks:
        for stage, nbytes in report.peak_saved.items():
            saved[stage] = max(saved.get(stage, 0), nbytes)
    return [most[rank] for rank in sorted(most)], saved


# -- predicted ------------------------------------------------------------------------------


def predicted(name: str, seed: int, calibration: Calibration, cost: str) -> Simulation:
    """The simulated step of a plan, with this machine's cores."""
    plan, cluster = drawn(name, seed)
    graph = captured(name)
    cores = os.cpu_count() or 1
    return simulate(
        graph, plan, cluster, calibration=calibration, cost=cost,
        lowered=lower_plan(graph, plan), cores=min(cores, cluster.n_devices),
    )  # fmt: skip


def prediction_row(found: Simulation) -> Row:
    """What of a simulation is compared."""
    memory: list[int] = []
    saved: dict[int, int] = {}
    for lane, timeline in zip(found.lanes, found.memory, strict=True):
        seen = [MOVING.index(what) for what in ("saved", "edges", "gradients")]
        between = timeline.moving[seen].sum(axis=0).max()  # what `Watched` sees
        held = int(between) + sum(timeline.resident.values())
        memory += [held] * len(lane.devices)
        saved.update(timeline.saved_peak)
    return {
        "predicted_s": found.step_s,
        "predicted_bytes": memory,
        "predicted_saved": {str(s): n for s, n in sorted(saved.items())},
        "bubble": found.bubble,
        "path": found.path_shares(),
    }


# -- figures --------------------------------------------------------------------------------


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two series without ties."""

    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        place = [0] * len(values)
        for rank, i in enumerate(order):
            place[i] = rank
        return place

    n = len(a)
    if n < 2:
        return 1.0
    squares = sum((x - y) ** 2 for x, y in zip(ranks(a), ranks(b), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def figures(rows: Sequence[Row]) -> Row:
    """MAPE and rank correlation of step times, largest and mean errors of bytes."""
    done = [r for r in rows if "measured_s" in r and "predicted_s" in r]
    errors = [r["predicted_s"] / r["measured_s"] - 1 for r in done]
    memory = [abs(e) for r in rows for e in _errors(r, "bytes")]
    saved = [abs(e) for r in rows for e in _errors(r, "saved")]
    return {
        "plans": len(done),
        "quiet": sum(bool(r["quiet"]) for r in done),
        "mape": statistics.mean(map(abs, errors)) if errors else 0.0,
        "bias": statistics.mean(errors) if errors else 0.0,
        "worst": max(map(abs, errors), default=0.0),
        "spearman": spearman([r["predicted_s"] for r in done], [r["measured_s"] for r in done]),
        "memory_mean": statistics.mean(memory) if memory else 0.0,
        "memory_worst": max(memory, default=0.0),
        "saved_worst": max(saved, default=0.0),
    }


def _errors(row: Row, what: str) -> list[float]:
    """Relative errors of bytes; a rank that holds less than a page counts as holding one."""
    return [(p - m) / max(m, PAGE) for p, m in _pairs(row, what)]


def _pairs(row: Row, what: str) -> list[tuple[float, float]]:
    ours, theirs = row.get(f"predicted_{what}"), row.get(f"measured_{what}")
    if ours is None or theirs is None:
        return []
    if isinstance(ours, dict):
        return [(ours[key], theirs[key]) for key in theirs]
    return list(zip(ours, theirs, strict=True))


def met(found: Row) -> bool:
    """Whether a model's figures reach the targets."""
    return bool(
        found["mape"] <= TARGETS["mape"]
        and found["spearman"] >= TARGETS["spearman"]
        and found["memory_worst"] <= TARGETS["memory"]
        and found["saved_worst"] <= TARGETS["saved"]
    )


# -- a run ----------------------------------------------------------------------------------


class Book:
    """The JSON file: one row per (model, plan), written after every plan."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, Row] = known.get("rows", {})

    def put(self, key: str, **values: Any) -> None:
        """Adds to a row and writes the file."""
        self.rows.setdefault(key, {}).update(values)

    def of(self, model: str) -> list[Row]:
        """The rows of one model."""
        return [r for key, r in sorted(self.rows.items()) if key.startswith(f"{model}/")]

    def write(self, names: Sequence[str], source: str) -> None:
        """Writes all rows and the figures of every model."""
        body = {
            "targets": TARGETS,
            "figures": {name: figures(self.of(name)) for name in names if self.of(name)},
            "source": source,
            "cores": os.cpu_count(),
            "rows": self.rows,
        }
        write_figures(self.path, body)


def line(key: str, row: Row) -> str:
    """One plan in words."""
    text = f"{key:<8} {row.get('what', ''):<60}"
    if "predicted_s" in row:
        text += f" predicted {row['predicted_s'] * 1e3:7.1f} ms"
    if "measured_s" in row:
        text += f" measured {row['measured_s'] * 1e3:7.1f} ms"
        if "predicted_s" in row:
            text += f" {row['predicted_s'] / row['measured_s'] - 1:+6.1%}"
        text += f" (quiet {row['quiet']}/{row['steps']}, disturbed {row['disturbed']:.0%})"
    for what in ("bytes", "saved"):
        off = _errors(row, what)
        if off:
            text += f" {what} {max(off, key=abs):+.1%}"
    return text


def _meshes(plan: Plan) -> str:
    shapes = ["x".join(str(n) for _, n in s.mesh.inner) or "1" for s in plan.stages]
    return "" if set(shapes) == {"1"} else ", sharded " + " ".join(shapes)


def one(book: Book, name: str, seed: int, args: argparse.Namespace, use: Calibration) -> None:
    """Measures (unless told not to) and predicts one plan."""
    key = f"{name}/{seed}"
    plan, cluster = drawn(name, seed)
    what = (
        f"{cluster.n_devices} devices, {len(plan.stages)} stages, D={plan.replicas}, "
        f"M={plan.microbatches}, {plan.schedule.name}{_meshes(plan)}"
    )
    book.put(key, what=what)
    if "time" in args.measure and not book.rows[key].get("quiet"):
        book.put(key, **measured_step(name, plan))
    if "memory" in args.measure:
        most, saved = measured_memory(name, plan)
        book.put(
            key,
            measured_bytes=most,
            measured_saved={str(s): n for s, n in sorted(saved.items())},
        )
    book.put(key, **prediction_row(predicted(name, seed, use, args.cost)))
    print(line(key, book.rows[key]), flush=True)


def main() -> int:
    """Runs the slice asked for; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", default="0:40", help="first:last of the seeds")
    parser.add_argument("--cost", default="analytic")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument(
        "--measure", default="time,memory", help="what to measure; nothing: predict anew"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.models.split(",")
    first, last = (int(n) for n in args.plans.split(":"))
    own = Cluster.local(os.cpu_count() or 1)
    use = read_calibration(args.calibration) if args.calibration else load_calibration(own)
    source = use.note
    book = Book(args.json)
    with ExitStack() as stack:
        if "time" in args.measure:
            stack.enter_context(raypar_cluster())
        for seed in range(first, last):
            for name in names:
                began = time.perf_counter()
                one(book, name, seed, args, use)
                book.put(f"{name}/{seed}", took_s=time.perf_counter() - began)
                book.write(list(MODELS), source)
    good = True
    for name in names:
        found = figures(book.of(name))
        good = good and met(found)
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
