"""Piper's cost model once more, by its formulas, and all pipelines of tiny workloads."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

Raw = dict[str, Any]
Stage = tuple[Sequence[int], int, int, Sequence[int]]


def workload(seed: int, *, layers: int = 4, uneven: bool = False, degrees: int = 2) -> Raw:
    """A random workload file's object; with `uneven`, variants differ in everything."""
    rng = random.Random(seed)
    ids = rng.sample(range(50), layers)
    edges = [(a, b) for a, b in itertools.combinations(range(layers), 2) if rng.random() < 0.5]
    nodes = []
    for at, one in enumerate(ids):
        before = [ids[a] for a, b in edges if b == at]
        after = [ids[b] for a, b in edges if a == at]
        tables = {}
        for degree in range(1, degrees + 1):
            if degree > 1 and rng.random() < 0.2:
                continue
            variants = []
            weights = rng.randint(0, 9)
            fw = {str(i): float(rng.randint(0, 3)) for i in before}
            bw = {str(i): float(rng.randint(0, 3)) for i in after}
            seconds, slope, always = rng.randint(0, 9), rng.randint(0, 5), rng.randint(0, 5)
            for number in range(rng.randint(1, 3)):
                if uneven and number:
                    weights = rng.randint(0, 9)
                    fw = {key: float(rng.randint(0, 3)) for key in fw}
                    bw = {key: float(rng.randint(0, 3)) for key in bw}
                variants.append(
                    {
                        "id": ("vanilla", "activation recomp", "more recomp")[number],
                        "timePerSample": (seconds + rng.randint(0, 4) * number) / degree,
                        "parameterSize": float(weights),
                        "memoryUsageA": max(0.0, slope - rng.randint(0, 3) * number),
                        "memoryUsageB": float(always + rng.randint(0, 2) * number),
                        "syncTimeFw": fw,
                        "syncTimeBw": bw,
                    }
                )
            tables[str(degree)] = variants
        nodes.append({"id": one, "name": f"n{one}", "TMPCs": tables})
    return {
        "nodes": nodes,
        "edges": [
            {"sourceId": ids[a], "destId": ids[b], "communicationCost": float(rng.randint(0, 5))}
            for a, b in edges
        ],
    }


def load(raw: Raw, stage: Sequence[int], picks: Sequence[Raw], d: int, B: int, W: float) -> float:
    """Load of a stage: (edges/d + gradients)/W + compute/d."""
    inside = dict(zip(stage, picks, strict=True))
    edges = 0.0
    for edge in raw["edges"]:
        u, v, c = edge["sourceId"], edge["destId"], edge["communicationCost"]
        if v in inside and u not in inside:
            edges += 2 * (c + inside[v]["syncTimeFw"][str(u)])
        if u in inside and v not in inside:
            edges += 2 * (c + inside[u]["syncTimeBw"][str(v)])
    gradients = 4 * (d - 1) / d * sum(p["parameterSize"] for p in picks) / B
    return (edges / d + gradients) / W + sum(p["timePerSample"] for p in picks) / d


def objective(
    raw: Raw, stages: Sequence[Stage],
    k: int, M: float, B: int, W: float,
) -> float | None:  # fmt: skip
    """Largest load of stages (ids, d, t, number of every variant); None if they are not valid."""
    where = {one: i for i, stage in enumerate(stages) for one in stage[0]}
    by_id = {node["id"]: node for node in raw["nodes"]}
    if sorted(where) != sorted(by_id) or sum(len(s[0]) for s in stages) != len(by_id):
        return None
    if any(where[e["sourceId"]] > where[e["destId"]] for e in raw["edges"]):
        return None
    if sum(d * t for _, d, t, _ in stages) > k or sum(d for _, d, _, _ in stages) > B:
        return None
    loads = []
    for i, (ids, d, t, numbers) in enumerate(stages):
        if B % d:
            return None
        picks = [by_id[one]["TMPCs"][str(t)][j] for one, j in zip(ids, numbers, strict=True)]
        y = math.ceil(sum(s[1] for s in stages[i:]) / d)
        if sum(p["memoryUsageA"] * y + p["memoryUsageB"] for p in picks) > M:
            return None
        loads.append(load(raw, ids, picks, d, B, W))
    return max(loads)


def best(raw: Raw, k: int, M: float, B: int, W: float) -> float:
    """The optimum over all pipelines, one by one; infinite where none is valid."""
    found = math.inf
    for parts in _ordered_partitions(raw):
        meshes = [
            [(d, t) for d in range(1, k + 1) if B % d == 0 for t in (1, 2) if d * t <= k]
            for _ in parts
        ]
        for chosen in itertools.product(*meshes):
            if sum(d * t for d, t in chosen) <= k and sum(d for d, _ in chosen) <= B:
                found = min(found, _best_variants(raw, parts, chosen, M, B, W))
    return found


def _best_variants(
    raw: Raw, parts: Sequence[Sequence[int]], meshes: Sequence[tuple[int, int]],
    M: float, B: int, W: float,
) -> float:  # fmt: skip
    by_id = {node["id"]: node for node in raw["nodes"]}
    worst = 0.0
    for i, (ids, (d, t)) in enumerate(zip(parts, meshes, strict=True)):
        y = math.ceil(sum(m[0] for m in meshes[i:]) / d)
        choices = [by_id[one]["TMPCs"].get(str(t), []) for one in ids]
        fitting = [
            load(raw, ids, picks, d, B, W)
            for picks in itertools.product(*choices)
            if sum(p["memoryUsageA"] * y + p["memoryUsageB"] for p in picks) <= M
        ]
        worst = max(worst, min(fitting, default=math.inf))
    return worst


def _ordered_partitions(raw: Raw) -> Iterator[list[list[int]]]:
    ids = [node["id"] for node in raw["nodes"]]
    edges = [(e["sourceId"], e["destId"]) for e in raw["edges"]]

    def rest(left: frozenset[int]) -> Iterator[list[list[int]]]:
        if not left:
            yield []
        for size in range(1, len(left) + 1):
            for stage in itertools.combinations(sorted(left), size):
                if not any(b in stage and a in left - set(stage) for a, b in edges):
                    for more in rest(left - set(stage)):
                        yield [list(stage), *more]

    yield from rest(frozenset(ids))
