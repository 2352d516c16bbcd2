"""All plans that one would make by hand with Megatron-LM for a model and a cluster.

The grid of Narayanan et al. 2021 ("Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM", sections 2 and 3), and the options that Megatron-LM has grown since: tensor
parallelism up to the devices of a node × pipeline stages × replicas × microbatch size ×
recomputation (none, selective, full) × stages per device (interleaving) × ZeRO (0, and 1: the
distributed optimizer). Every layer is sharded alike: tensor parallelism without batch sharding on
the tensor axis, by the same integer program that the search uses; stages are cut evenly by time.

The whole grid is ranked by the solvers' quick figures; then the most promising plans of every
shape are lowered and played by the simulator, memory included, as the search's own plans are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from raypar.errors import RayparError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import RECOMPUTE_POLICIES, Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.pipeline import Pipeline, WayTable, best_pipeline
from raypar.search.interop.space import Split
from raypar.search.interop.ways import Wish
from raypar.search.interop.workbench import Workbench
from raypar.search.simulate import simulate

SIZES = (1, 2, 4, 8)
"""Samples of a microbatch on one replica."""
CHUNKS = (1, 2, 4)
ZEROS = (0, 1)
MEMORY = 0.9
"""Share of a device's memory that a plan may fill."""


@dataclass(frozen=True)
class ByHand:
    """One plan of the grid, not yet lowered.

    Attributes:
        split: How the batch is cut.
        tensor: Devices that share every layer.
        groups: Pipeline ranks.
        chunks: Stages on each.
        wish: Recomputation and ZeRO level.
        pipeline: The stages.
        step_s: Seconds of a step by quick figures.
    """

    split: Split
    tensor: int
    groups: int
    chunks: int
    wish: Wish
    pipeline: Pipeline
    step_s: float


@dataclass(frozen=True)
class GridBest:
    """What the grid gave.

    Attributes:
        plan: The best plan that fits; None: none does.
        step_s: Its simulated seconds.
        ranked: Plans of the grid that fit by quick figures.
        played: Of these, how many were lowered and simulated.
    """

    plan: Plan | None
    step_s: float
    ranked: int
    played: int


def best_by_hand(
    graph: OpGraph,
    cluster: Cluster,
    calibration: Calibration,
    *,
    microbatches: int | None = None,
    most_played: int = 8,
) -> GridBest:
    """The fastest plan of the grid.

    Args:
        graph: The captured model.
        cluster: The devices.
        calibration: What they reach.
        microbatches: M, where it belongs to the model's recipe.
        most_played: Plans to lower and simulate.
    """
    config = SearchConfig(planner="alpa", microbatches=microbatches or "auto")
    bench = Workbench(graph, cluster, config, calibration)
    found = list(grid(bench, microbatches))
    best: tuple[float, Plan | None] = float("inf"), None
    played = 0
    for one in _in_turn(found):
        if played == most_played:
            break
        played += 1
        seconds, plan = _played(bench, one)
        if seconds < best[0]:
            best = seconds, plan
    return GridBest(best[1], best[0], len(found), played)


def grid(bench: Workbench, microbatches: int | None = None) -> Iterator[ByHand]:
    """Every plan by hand that fits the memory by quick figures, in no order."""
    devices, batch = bench.cluster.n_devices, bench.graph.global_batch
    layers = len(bench.units)
    for tensor in (2**k for k in range(bench.per_node.bit_length())):
        for groups in (n for n in range(1, min(devices // tensor, layers) + 1)):
            replicas = devices // (tensor * groups)
            if replicas * tensor * groups != devices or replicas > bench.graph.max_replicas:
                continue
            if batch % replicas:
                continue
            share = batch // replicas
            counts = [microbatches] if microbatches else [share // n for n in SIZES]
            for count in counts:
                if count and share % count == 0:
                    split = Split(replicas, count, share // count, devices // replicas)
                    yield from _of_split(bench, split, tensor, groups)


def _of_split(bench: Workbench, split: Split, tensor: int, groups: int) -> Iterator[ByHand]:
    for recompute in RECOMPUTE_POLICIES:
        for zero in ZEROS if split.replicas > 1 else (0,):
            wish = Wish(modes="tensor", recompute=recompute, zero=zero)
            devices = bench.line[: split.replicas * tensor]
            ways = [
                way
                for way in bench.maker.ways(split, tensor, devices, wish)
                if len(way.key.shape) < 2  # type: ignore[attr-defined]
            ]
            if not ways:
                continue
            table = WayTable(ways, split.microbatches)
            for chunks in CHUNKS if groups > 1 else (1,):
                stages = groups * chunks
                if stages > len(bench.units) or (chunks > 1 and split.microbatches % groups):
                    continue
                pipeline = best_pipeline(
                    {tensor: [table]},
                    stages * tensor,
                    split.microbatches,
                    unit=tensor,
                    most_stages=stages,
                    exactly=stages,
                )
                if pipeline.stages:
                    slowest = max(stage.seconds for stage in pipeline.stages)
                    # One round through all groups, then every device works through its chunks.
                    step_s = slowest * (chunks * split.microbatches + groups - 1)
                    yield ByHand(split, tensor, groups, chunks, wish, pipeline, step_s)


def _in_turn(found: Sequence[ByHand]) -> list[ByHand]:
    """Fastest first; of each shape the best comes before the second best of any within a tenth.

    Quick figures compare microbatches and recomputation better than shapes.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    order = []
    for one in sorted(found, key=lambda one: one.step_s):
        shape = one.tensor, one.groups, one.chunks
        order.append((one.step_s * 1.1 ** seen[shape], one))
        seen[shape] += 1
    return [one for _, one in sorted(order, key=lambda pair: pair[0])]


def _played(bench: Workbench, one: ByHand) -> tuple[float, Plan | None]:
    """Simulated seconds and the plan; infinite where it does not fit."""
    groups, chunks = one.groups, one.chunks
    stages = [
        replace(stage, place=(i % groups) * one.tensor)
        for i, stage in enumerate(one.pipeline.stages)
    ]
    best: tuple[float, Plan | None] = float("inf"), None
    for schedule in ("interleaved_1f1b",) if chunks > 1 else ("1f1b", "gpipe"):
        plan = bench.plan_of(
            one.split,
            stages,
            schedule,
            planner="by hand",
            placement=[(i % groups, i // groups) for i in range(len(stages))],
        )
        seconds, fits = played(bench.graph, plan, bench.cluster, bench.calibration)
        if fits and seconds < best[0]:
            best = seconds, plan
        if groups == 1:
            break
    return best


def played(
    graph: OpGraph, plan: Plan, cluster: Cluster, calibration: Calibration
) -> tuple[float, bool]:
    """(simulated seconds of a step, whether the plan fits the memory)."""
    try:
        found = simulate(graph, plan, cluster, calibration=calibration)
    except RayparError:
        return float("inf"), False
    peaks = zip(found.lanes, found.peak_bytes, strict=True)
    return found.step_s, all(peak <= MEMORY * lane.memory_limit for lane, peak in peaks)
