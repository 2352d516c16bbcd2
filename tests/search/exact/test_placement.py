"""Device placement against an evaluator and an enumeration of its own."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.errors import PlanError
from raypar.graph.workloads import PlacementWorkload, read_workload
from raypar.search.exact.placement import solve_placement
from raypar.search.exact.placement_bounds import divisible_bound
from raypar.search.exact.placement_contiguous import best_contiguous
from raypar.search.exact.placement_local import local_search
from raypar.search.exact.placement_problem import by_item, problem_of
from raypar.search.exact.placement_reduce import reduced
from release.placement import main
from tests._tiers import examples
from tests.search.exact.placement_graphs import GraphWriter, cells, layered, transformer


def largest_load(raw: Mapping[str, Any], device_of: Mapping[int, int]) -> float:
    """Largest load by the published definition; infinite where the placement is not allowed."""
    k = raw["maxFPGAs"]
    load = dict.fromkeys(range(k + raw["maxCPUs"]), 0.0)
    held = dict.fromkeys(load, 0.0)
    colour: dict[int, int] = {}
    for node in raw["nodes"]:
        device = device_of[node["id"]]
        if colour.setdefault(node.get("colorClass", -1 - node["id"]), device) != device:
            return math.inf
        if device < k and not node["supportedOnFpga"]:
            return math.inf
        load[device] += node["fpgaLatency"] if device < k else node["cpuLatency"]
        held[device] += node["size"]
    if any(held[d] > raw["maxSizePerFPGA"] for d in range(k)):
        return math.inf
    crossing: dict[tuple[int, int], float] = {}
    for edge in raw["edges"]:
        ends = device_of[edge["sourceId"]], device_of[edge["destId"]]
        if ends[0] != ends[1]:
            for device in ends:
                crossing[edge["sourceId"], device] = edge["cost"]
    for (_, device), cost in crossing.items():
        load[device] += cost if device < k else 0.0
    return max(load.values())


def is_contiguous(raw: Mapping[str, Any], device_of: Mapping[int, int]) -> bool:
    """Whether devices can be put in an order that no edge of the forward pass goes against."""
    backward = {node["id"] for node in raw["nodes"] if node["isBackwardNode"]}
    after: dict[int, set[int]] = {d: set() for d in device_of.values()}
    for edge in raw["edges"]:
        u, v = edge["sourceId"], edge["destId"]
        if u not in backward and v not in backward and device_of[u] != device_of[v]:
            after[device_of[u]].add(device_of[v])
    left = set(after)
    while left:
        free = {d for d in left if not any(d in after[e] for e in left)}
        if not free:
            return False
        left -= free
    return True


def written(raw: Mapping[str, Any], folder: Path) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps(raw))
    return path


def workload(raw: Mapping[str, Any], folder: Path) -> PlacementWorkload:
    found = read_workload(written(raw, folder))
    assert isinstance(found, PlacementWorkload)
    return found


def by_id(work: PlacementWorkload, device_of: Any) -> dict[int, int]:
    return {node.id: device_of[at] for at, node in enumerate(work.nodes)}


def tiny(seed: int) -> dict[str, Any]:
    """At most seven colour classes, with every feature of the form at times."""
    rng = random.Random(seed)
    graph = GraphWriter()
    for i in range(rng.randint(2, 6)):
        inputs = rng.sample(range(i), min(i, rng.randint(0, 2)))
        graph.add(
            rng.choice([0.0, 0.5, 1.0, 2.3]),
            rng.choice([0.0, 0.1, 0.4, 1.5]),
            *inputs,
            colour=rng.choice([None, 1, 2]) if rng.random() < 0.3 else None,
            size=rng.choice([0.0, 1.0, 2.0]),
            cpu_factor=rng.choice([0.3, 1.5, 10.0]),
        )
        graph.nodes[-1]["supportedOnFpga"] = int(rng.random() < 0.9)
    if rng.random() < 0.4:
        graph.mirrored()
    return graph.json(rng.choice([1, 2, 2]), 1, memory=rng.choice([4.0, 8.0, 1e9]))


@settings(max_examples=examples(20, 60), deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tiny_graphs_reach_the_optimum_of_an_enumeration(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = tiny(seed)
    work = workload(raw, tmp_path_factory.mktemp("tiny"))
    ids = [node["id"] for node in raw["nodes"]]
    colours = [node.get("colorClass", -1 - node["id"]) for node in raw["nodes"]]
    classes = list(dict.fromkeys(colours))
    best = best_split = math.inf
    for devices in itertools.product(range(work.accelerators + work.cpus), repeat=len(classes)):
        chosen = dict(zip(classes, devices, strict=True))
        device_of = {i: chosen[c] for i, c in zip(ids, colours, strict=True)}
        load = largest_load(raw, device_of)
        best = min(best, load)
        if load < best_split and is_contiguous(raw, device_of):
            best_split = load
    found = solve_placement(work, seconds=10)
    free = found.noncontiguous
    assert free.objective == pytest.approx(best)
    assert free.bound <= best * (1 + 1e-9)
    assert largest_load(raw, by_id(work, free.device_of)) == pytest.approx(free.objective)
    assert found.contiguous is not None
    assert found.contiguous.objective == pytest.approx(best_split)
    assert found.contiguous.bound == pytest.approx(best_split)
    split = by_id(work, found.contiguous.device_of)
    assert largest_load(raw, split) == pytest.approx(best_split)
    assert is_contiguous(raw, split)


@pytest.mark.parametrize(
    "raw",
    [transformer(2, 3, True), cells(3, 4, True), layered(8, 3, 3, seed=1)],
    ids=["transformer", "cells", "layered"],
)
def test_larger_graphs_keep_to_the_definition(raw: dict[str, Any], tmp_path: Path) -> None:
    work = workload(raw, tmp_path)
    problem = problem_of(work)
    split = best_contiguous(problem, seconds=20)
    assert split.exact
    device_of = by_id(work, split.device_of)
    assert largest_load(raw, device_of) == pytest.approx(split.objective)
    assert is_contiguous(raw, device_of)
    smaller = reduced(problem, split.objective, contiguous=False)
    found = local_search(smaller, by_item(smaller, split.device_of), math.inf, 3000)
    assert divisible_bound(problem) <= found.objective <= split.objective * (1 + 1e-12)


def test_with_too_many_downsets_the_split_has_a_bound_below_it(tmp_path: Path) -> None:
    work = workload(layered(9, 4, 3, seed=2), tmp_path)
    problem = problem_of(work)
    exact = best_contiguous(problem, seconds=30)
    rough = best_contiguous(problem, seconds=30, most=40)
    assert exact.exact
    assert not rough.exact
    assert rough.bound <= exact.objective <= rough.objective
    assert is_contiguous(layered(9, 4, 3, seed=2), by_id(work, rough.device_of))


def test_backward_nodes_without_a_forward_one_follow_the_mirrored_order(tmp_path: Path) -> None:
    graph = GraphWriter()
    a = graph.add(1.0, 0.1, colour=0)
    b = graph.add(1.0, 0.1, a, colour=1)
    late = graph.add(1.0, 0.1, b, colour=1, backward=True)
    orphan = graph.add(1.0, 0.1, late, backward=True)
    graph.add(1.0, 0.1, orphan, colour=0, backward=True)
    problem = problem_of(workload(graph.json(2), tmp_path))
    names = {nodes: item for item, nodes in enumerate(problem.members)}
    first, last, alone = names[0, 4], names[1, 2], names[(3,)]
    assert problem.before == {(first, last), (first, alone), (alone, last)}


def chain(**changes: Any) -> dict[str, Any]:
    graph = GraphWriter()
    x = graph.add(1.0, 0.5)
    for _ in range(3):
        x = graph.add(1.0, 0.5, x)
    raw = graph.json(2, 0)
    for key, value in changes.items():
        place: Any = raw
        *path, last = key.split("__")
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return raw


def test_command_writes_placements_by_node_id(tmp_path: Path) -> None:
    raw = chain(nodes__0__id=77, edges__0__sourceId=77)
    out = tmp_path / "out.json"
    source = written(raw, tmp_path)
    assert main(["--input", str(source), "--json", str(out), "--devices", "3"]) == 0
    found = json.loads(out.read_text())
    for name in ("contiguous", "noncontiguous"):
        device_of = {int(i): d for i, d in found[name]["assignment"].items()}
        assert set(device_of) == {77, 1, 2, 3}
        load = largest_load({**raw, "maxFPGAs": 3}, device_of)
        assert load == found[name]["objective"] == 2.5
        assert found[name]["bound"] <= 2.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edges__2__destId": 0}, "cycle"),
        ({"edges__1__destId": 9}, "no node 9"),
        ({"nodes__1__fpgaLatency": None}, "nodes[1] has no 'fpgaLatency'"),
        ({"nodes__1__size": -1}, "nodes[1].size is -1"),
        ({"edges__0__cost": None}, "edges[0] has no 'cost'"),
        ({"maxFPGAs": None}, "no 'maxFPGAs'"),
        ({"maxFPGAs": 0}, "set maxFPGAs to 1"),
        ({"nodes__2__supportedOnFpga": 0}, "set maxCPUs to 1"),
        ({"nodes__2__supportedOnFpga": "yes"}, "0, 1, true or false"),
        ({"maxSizePerFPGA": 0.5}, "set maxSizePerFPGA to 1"),
        ({"maxSizePerFPGA": 1.5}, "no placement that fits"),
        ({"nodes__0__isBackwardNode": 1}, "isBackwardNode 1"),
        ({"nodes__0__id": 3}, "id 3 is given twice"),
        ({"nodes": []}, "nodes is empty"),
    ],
)
def test_bad_files_are_one_clear_error(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(chain(**changes), tmp_path)
    assert main(["--input", str(source), "--seconds", "2"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert words in text
    assert text.count("\n") == 1


def test_edges_of_one_node_agree_about_its_cost(tmp_path: Path) -> None:
    raw = chain()
    raw["edges"].append({"sourceId": 0, "destId": 3, "cost": 0.7})
    with pytest.raises(PlanError, match=r"another edge out of node 0 has 0\.5"):
        workload(raw, tmp_path)
