"""Lower bounds: held against every plan of small random instances, and against large models' plans.

    python release/bounds.py [--instances 200] [--seed 0] [--large 39B,512,1024,3072] [--json FILE]

An instance is a random small model (widths, depth, kind of layers, batch), a random cluster (one
kind of device or two, one node or two, memory that may be short) and random options. Planner
`exhaustive` plays all of its plans; the bound of the same options has to be at most the fastest of
them that fits the memory, and the bound that does not ask for it at most the fastest of all. Then
memory is made as short as each of its leanest plans needs: the bound for that much has to be at
most the fastest plan that still fits. Exits with 1 where one is not.

The large models are GPT-39B on 64 V100 and GPT-175B on 512 A100, 1,024 H100 and 3,072 A100; printed
are the bound and its parts, its processor seconds (captures included), and the gap of the plan that
planner `alpa` makes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the project's root holds `release`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from raypar import Cluster, capture
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration, DeviceRates, MemoryCurve, table_calibration
from raypar.mesh.cluster import Node
from raypar.mesh.devices import Link, device_kind
from raypar.search.bounds import certificate, lower_bound
from raypar.search.config import SearchConfig
from raypar.search.planners.alpa import AlpaSearch
from raypar.search.planners.exhaustive import ExhaustiveSearch
from release.workloads import ALPA_GPT, GPT_175B, Workload

RESULTS = Path(__file__).parent / "results" / "bounds.json"
MOST_PLANS = 80
"""Plans of one instance; options are fixed one by one until there are no more."""
_DRIVER_BYTES = 950 << 20
_TIGHT = 4
"""Sizes of memory that are tried on one instance: what its leanest plans need."""
LARGE: dict[str, tuple[Workload, int, str]] = {
    "39B": (ALPA_GPT["39B"], 8, "V100"),
    "512": (GPT_175B, 64, "A100"),
    "1024": (GPT_175B, 128, "H100"),
    "3072": (GPT_175B, 384, "A100"),
}
"""Name → model, nodes of eight devices, their kind."""


class Block(nn.Module):
    """A residual block of a random kind."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1) if kind == "conv" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if self.kind == "attention":
            y = nn.functional.scaled_dot_product_attention(y, y, y)
        if self.mix is not None:
            y = self.mix(y.transpose(1, 2)).transpose(1, 2)
        return x + self.second(nn.functional.gelu(self.first(y)))


class Small(nn.Module):
    """A few blocks, with a token table in front or not."""

    def __init__(self, kinds: tuple[str, ...], width: int, tokens: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width) if tokens else None
        self.blocks = nn.Sequential(*(Block(kind, width) for kind in kinds))
        self.head = nn.Linear(width, tokens or 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x if self.table is None else self.table(x)))


def squares(out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """A loss of any model of these."""
    return out.square().mean()


@dataclass(frozen=True)
class Instance:
    """A question that is small enough to try every answer."""

    graph: OpGraph
    cluster: Cluster
    calibration: Calibration
    config: SearchConfig


def random_instance(seed: int, most: int = MOST_PLANS) -> Instance:
    """Draws one; equal seeds give equal ones.

    Args:
        seed: Of the generator.
        most: Most plans that it may have.
    """
    rng = random.Random(f"bounds {seed}")
    graph = _graph(rng)
    cluster = _cluster(rng)
    calibration = _calibration(rng, cluster)
    return Instance(graph, cluster, calibration, _options(rng, graph, cluster, calibration, most))


def _graph(rng: random.Random) -> OpGraph:
    kinds = tuple(rng.choice(("plain", "attention", "conv")) for _ in range(rng.randint(1, 3)))
    width, length = rng.choice((8, 24, 64, 256)), rng.choice((4, 16, 64))
    tokens = rng.choice((0, 0, 32))
    samples = rng.choice((2, 4, 6, 8))
    shape = (samples, length) if tokens else (samples, length, width)
    batch = torch.zeros(shape, dtype=torch.long if tokens else torch.float32)
    return capture(lambda: Small(kinds, width, tokens), (batch,), squares)


def _cluster(rng: random.Random) -> Cluster:
    kinds = rng.choice((("CPU",), ("A100",), ("A100", "L4"), ("V100", "H100"), ("CPU", "slow")))
    counts = [rng.choice((1, 2)) for _ in kinds]
    nodes = []
    for i, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        device = device_kind("CPU" if kind == "slow" else kind)
        if kind == "slow":
            flops = {name: rate / 3 for name, rate in device.flops.items()}
            device = replace(device, name="slow CPU", flops=flops, bandwidth=device.bandwidth / 3)
        link = Link(10 ** rng.uniform(8, 11), 10 ** rng.uniform(-6, -4))
        nodes.append(Node.of(device, count, name=f"n{i}", inside=link, across=link))
    return Cluster(tuple(nodes), "small")


def _calibration(rng: random.Random, cluster: Cluster) -> Calibration:
    found = table_calibration(cluster)
    if rng.random() < 0.5:
        return found
    devices = {name: _rates(rng, rates) for name, rates in found.devices.items()}
    return replace(found, devices=devices)


def _rates(rng: random.Random, rates: DeviceRates) -> DeviceRates:
    """Like a measurement: classes of op at rates of their own, two of them by size."""
    base = rates.memory["plain"].near
    kinds = ("plain", "exp", "exp_backward", "norm", "norm_backward", "gather", "reduce", "copy")
    memory = {
        kind: MemoryCurve(
            base * rng.uniform(0.5, 3), base * rng.uniform(0.1, 0.5), 10 ** rng.uniform(3, 6)
        )
        for kind in kinds
    }
    return replace(rates, memory=memory, overhead=10 ** rng.uniform(-6.5, -5))


def _options(
    rng: random.Random, graph: OpGraph, cluster: Cluster, calibration: Calibration, most: int
) -> SearchConfig:
    """Fixes options in random order until the space is small."""
    config = SearchConfig(planner="exhaustive", trials=most)
    if rng.random() < 0.5:  # memory is short: a few MB beside what drivers take
        least = min(node.device_memory for node in cluster.nodes)
        gpu = all(node.device.is_gpu for node in cluster.nodes)
        few = 10 ** rng.uniform(5.5, 7.5) + (_DRIVER_BYTES if gpu else 0)
        config = replace(config, memory_fraction=few / least)
    open_: dict[str, tuple[Any, ...]] = {
        "zero": (0, 1, 2, 3), "recompute": ("none", "selective", "full"), "replicas": (1, 2),
        "microbatches": (1, 2), "schedule": ("1f1b", "gpipe", "zero_bubble_h1"), "stages": (1, 2),
        "tensor": (1, 2),
    }  # fmt: skip
    names = rng.sample(list(open_), len(open_))
    for name in names:
        try:
            if ExhaustiveSearch(graph, cluster, config, calibration).count() <= most:
                break
        except PlanError:
            pass
        config = replace(config, **{name: rng.choice(open_[name])})
    return config


@dataclass(frozen=True)
class Held:
    """What one instance showed.

    Attributes:
        seed: Its seed.
        devices: Of its cluster.
        plans: How many were played.
        fitting: How many of them fit the memory.
        best_s: The fastest of those; 0 where none fits.
        fastest_s: The fastest of all.
        bound_s: The bound for plans that fit.
        any_s: The bound for all plans.
        tight: For every size of memory that was tried: (share of the memory, the fastest plan that
            fits it, the bound).
    """

    seed: int
    devices: str
    plans: int
    fitting: int
    best_s: float
    fastest_s: float
    bound_s: float
    any_s: float
    tight: tuple[tuple[float, float, float], ...]

    @property
    def holds(self) -> bool:
        """Whether no plan is faster than its bound."""
        return (
            self.any_s <= self.fastest_s
            and (not self.fitting or self.bound_s <= self.best_s)
            and all(bound <= best for _, best, bound in self.tight)
        )

    @property
    def raised(self) -> int:
        """For how many sizes of memory the bound is larger because of it."""
        return sum(bound > self.any_s * (1 + 1e-9) for _, _, bound in self.tight)

    @property
    def gap(self) -> float:
        """How much longer the best plan takes than the bound, relative to it."""
        return self.best_s / self.bound_s - 1 if self.fitting else 0.0


def hold(seed: int, most: int = MOST_PLANS) -> Held | None:
    """Plays all plans of an instance; None where its options contradict each other."""
    one = random_instance(seed, most)
    try:
        search = ExhaustiveSearch(one.graph, one.cluster, one.config, one.calibration)
        if search.count() > most:
            return None
        entries = list(search.entries())
        bound = _bound_s(one, one.config)
    except PlanError:
        return None
    if not entries:
        return None
    fitting = [e.step_s for e in entries if e.overfull <= 1.0]
    tight = []
    for size in sorted({e.overfull for e in entries})[:_TIGHT]:
        share = one.config.memory_fraction * size
        best = min(e.step_s for e in entries if e.overfull <= size)
        tight.append((share, best, _bound_s(one, replace(one.config, memory_fraction=share))))
    return Held(
        seed, one.cluster.describe(), len(entries), len(fitting), min(fitting, default=0.0),
        min(e.step_s for e in entries), bound, _bound_s(one, one.config, fitting=False),
        tuple(tight),
    )  # fmt: skip


def _bound_s(one: Instance, config: SearchConfig, *, fitting: bool = True) -> float:
    return lower_bound(one.graph, one.cluster, one.calibration, config, fitting=fitting).step_s


def small(count: int, first: int) -> list[Held]:
    """Instances until `count` have at least one plan."""
    found: list[Held] = []
    seed = first
    while len(found) < count:
        held = hold(seed)
        seed += 1
        if held is None:
            continue
        found.append(held)
        if not held.holds:
            print(f"instance {held.seed}: NOT held, {held}", flush=True)
        if len(found) % 20 == 0:
            print(f"{len(found)} instances, {sum(h.plans for h in found)} plans", flush=True)
    return found


def large(name: str) -> dict[str, object]:
    """The bound of a large model, and the gap of the plan that `alpa` makes."""
    workload, nodes, kind = LARGE[name]
    graph = workload.capture()
    cluster = Cluster.virtual(nodes=nodes, devices_per_node=8, device=kind)
    worked = time.process_time()
    bound = lower_bound(graph, cluster, table_calibration(cluster))
    worked = time.process_time() - worked
    config = SearchConfig(planner="alpa")
    plan = AlpaSearch(graph, cluster, config, table_calibration(cluster)).run()
    step = plan.predicted["step_s"]
    gap = certificate(step, bound)["gap"]
    print(
        f"{workload.name:9s} on {cluster.n_devices:5d} {kind:5s} bound {bound.step_s:8.3f} s "
        f"({worked:.1f} s of a processor), alpa {step:8.3f} s: gap {gap:.1%}; {bound.binding}",
        flush=True,
    )
    return {
        "model": workload.name, "devices": cluster.n_devices, "kind": kind, "cpu_s": worked,
        "bound_s": bound.step_s, "parts": bound.parts, "alpa_s": step, "gap": gap,
        "binding": bound.binding,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", default=",".join(LARGE), help="comma-separated; empty: none")
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = small(asked.instances, asked.seed)
    broken = [h.seed for h in found if not h.holds]
    gaps = sorted(h.gap for h in found if h.fitting)
    figures: dict[str, object] = {
        "instances": len(found),
        "plans": sum(h.plans for h in found),
        "with_plans_that_do_not_fit": sum(h.fitting < h.plans for h in found),
        "sizes_of_memory": sum(len(h.tight) for h in found),
        "sizes_that_raise_it": sum(h.raised for h in found),
        "broken": broken,
        "median_gap": gaps[len(gaps) // 2] if gaps else None,
        "rows": [asdict(h) | {"gap": h.gap} for h in found],
    }
    print(
        f"{len(found)} instances, {figures['plans']} plans, {figures['sizes_of_memory']} sizes of "
        f"memory ({figures['sizes_that_raise_it']} raise the bound): {len(broken)} broken; "
        f"median gap {figures['median_gap']}"
    )
    named = [name for name in asked.large.split(",") if name]
    results = {"small": figures, "large": {name: large(name) for name in named}}
    asked.json.write_text(json.dumps({"figures": results}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
