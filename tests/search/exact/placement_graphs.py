"""Operator graphs in the published form, made up for tests."""

from __future__ import annotations

import random
from typing import Any

MATMUL = 1.1


class GraphWriter:
    """Collects nodes and edges, and writes the published JSON."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.edges: list[tuple[int, int]] = []
        self.cost: dict[int, float] = {}
        self.constants: set[int] = set()  # nodes without a gradient

    def add(
        self,
        latency: float,
        cost: float,
        *inputs: int,
        colour: int | None = None,
        size: float = 1.0,
        backward: bool = False,
        cpu_factor: float = 23.0,
    ) -> int:
        at = len(self.nodes)
        node = {
            "id": at,
            "supportedOnFpga": 1,
            "cpuLatency": latency * cpu_factor,
            "fpgaLatency": latency,
            "isBackwardNode": int(backward),
            "size": size,
        }
        if colour is not None:
            node["colorClass"] = colour
        self.nodes.append(node)
        self.cost[at] = cost
        self.edges += [(i, at) for i in inputs]
        return at

    def mirrored(self, factor: float = 2.0) -> None:
        """Adds a backward node for every node: it reads its readers' gradients and its output.

        What it makes is as large as the largest input.
        """
        count = len(self.nodes)
        forward = list(self.edges)
        for i in range(count):
            self.nodes[i].setdefault("colorClass", 100_000 + i)
        grad: dict[int, int] = {}
        for i in reversed(range(count)):
            node = self.nodes[i]
            if i in self.constants:
                continue
            readers = [grad[v] for u, v in forward if u == i and v in grad]
            grad[i] = self.add(
                node["fpgaLatency"] * factor,
                max((self.cost[u] for u, v in forward if v == i), default=self.cost[i]),
                *readers,
                i,
                colour=node["colorClass"],
                size=node["size"],
                backward=True,
            )

    def json(self, accelerators: int, cpus: int = 1, memory: float = 1e12) -> dict[str, Any]:
        return {
            "maxSizePerFPGA": memory,
            "maxFPGAs": accelerators,
            "maxCPUs": cpus,
            "nodes": self.nodes,
            "edges": [
                {"sourceId": u, "destId": v, "cost": self.cost[u]}
                for u, v in dict.fromkeys(self.edges)
            ],
        }


def transformer(layers: int, accelerators: int, training: bool, seed: int = 0) -> dict[str, Any]:
    """Operators of an encoder: attention's four branches, dear tensors in the middle of layers."""
    graph = GraphWriter()
    rng = random.Random(seed)
    small, heads, wide = 0.73, 5.86, 23.4

    def weight() -> int:
        return graph.add(0.0, rng.choice([0.0002, 0.03, 0.9]))

    state = graph.add(0.05, small)
    state = graph.add(0.2, small, state, weight())
    mask = graph.add(1e-5, 0.005)
    graph.constants.add(mask)
    for _ in range(layers):
        branches = []
        for _ in range(3):
            x = graph.add(0.034, small, state, weight())
            x = graph.add(0.049, small, x, weight())
            x = graph.add(0.024, small, x)
            branches.append(graph.add(0.049, small, x))
        q, k, v = branches
        scores = graph.add(0.3, heads, q, k)
        scores = graph.add(0.4, heads, scores, mask)
        scores = graph.add(0.8, heads, scores)
        scores = graph.add(0.4, heads, scores)
        x = graph.add(0.3, small, scores, v)
        for latency in (0.049, 0.024, 0.034, 0.049):
            x = (
                graph.add(latency, small, x, weight())
                if latency == 0.034
                else graph.add(latency, small, x)
            )
        x = graph.add(0.049, small, x, state)
        x = graph.add(0.2, small, x, weight(), weight())
        y = graph.add(MATMUL, wide, x, weight())
        y = graph.add(1.57, wide, y, weight())
        y = graph.add(1.57, wide, y)
        y = graph.add(MATMUL, small, y, weight())
        y = graph.add(0.049, small, y)
        y = graph.add(0.049, small, y, x)
        state = graph.add(0.2, small, y, weight(), weight())
    graph.add(0.3, small, state, weight())
    if training:
        graph.mirrored()
    return graph.json(accelerators)


def cells(count: int, accelerators: int, training: bool, seed: int = 0) -> dict[str, Any]:
    """Cells of four parallel branches of unequal length: very many downsets."""
    rng = random.Random(seed)
    graph = GraphWriter()
    x = graph.add(1.0, 0.05)
    for _ in range(count):
        ends = []
        for length in (3, 6, 12, 6):
            y = x
            for _ in range(length):
                y = graph.add(rng.uniform(0.05, 0.5), rng.uniform(0.01, 0.1), y, cpu_factor=10)
            ends.append(y)
        x = graph.add(0.05, 0.1, *ends, cpu_factor=10)
    if training:
        graph.mirrored()
    return graph.json(accelerators)


def layered(
    levels: int, width: int, accelerators: int, training: bool = False, seed: int = 0, cpus: int = 1
) -> dict[str, Any]:
    """Random levels: every node reads one to three of the two levels before."""
    rng = random.Random(seed)
    graph = GraphWriter()
    rows: list[list[int]] = []
    for level in range(levels):
        row = []
        for _ in range(rng.randint(1, width)):
            near = [i for r in rows[-2:] for i in r]
            inputs = rng.sample(near, min(len(near), rng.randint(1, 3))) if level else []
            row.append(
                graph.add(
                    round(rng.expovariate(1.0), 3),
                    round(rng.expovariate(5.0), 3),
                    *inputs,
                    cpu_factor=rng.choice([0.5, 3, 10]),
                    size=rng.randint(0, 4),
                )
            )
        rows.append(row)
    if training:
        graph.mirrored()
    return graph.json(accelerators, cpus)
