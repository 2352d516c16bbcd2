"""Workload files of profiled layers: read as they are, refused with one clear error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raypar.errors import PlanError
from raypar.graph.workloads import LayerWorkload, read_workload

Raw = dict[str, Any]


def variant(name: str, seconds: float) -> Raw:
    """One way to run a layer."""
    figures = {"timePerSample": seconds, "parameterSize": 2.0, "memoryUsageA": 3.0}
    return {
        "id": name, **figures, "memoryUsageB": 4.0, "syncTimeFw": {}, "syncTimeBw": {"7": 5.0},
    }  # fmt: skip


GOOD: Raw = {
    "maxDevices": 10,
    "maxMemoryPerDevice": 8e10,
    "bandwidth": 25e9,
    "mbsInBatch": 1920,
    "nodes": [
        {"id": 3, "name": "a", "TMPCs": {"1": [variant("vanilla", 1.0)]}},
        {
            "id": 7,
            "name": "b",
            "TMPCs": {
                "1": [variant("vanilla", 1.0), variant("activation recomp", 2.0)],
                "2": [variant("vanilla", 0.5)],
            },
        },
    ],
    "edges": [{"sourceId": 3, "destId": 7, "communicationCost": 6.0}],
}


def read(tmp_path: Path, raw: object) -> Any:
    """What the door makes of a file."""
    path = tmp_path / "workload.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return read_workload(path)


def test_it_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert isinstance(found, LayerWorkload)
    assert [layer.id for layer in found.layers] == [3, 7]
    assert found.degrees == (1, 2)
    assert found.edges[0].nbytes == 6.0
    assert (found.devices, found.microbatches, found.bandwidth) == (10, 1920, 25e9)
    plain, again = found.layers[1].variants[1]
    assert (plain.seconds, plain.bytes_per_flight, plain.bytes_always) == (1.0, 3.0, 4.0)
    assert plain.sync_backward == {7: 5.0}
    assert (plain.recomputes, again.recomputes) == (False, True)


def nothing_said(raw: Raw) -> None:
    """Takes out what a file need not say."""
    for key in ("maxDevices", "maxMemoryPerDevice", "bandwidth", "mbsInBatch"):
        del raw[key]


def test_a_file_need_not_name_a_setting(tmp_path: Path) -> None:
    raw = copy.deepcopy(GOOD)
    nothing_said(raw)
    found = read(tmp_path, raw)
    assert (found.devices, found.memory, found.bandwidth, found.microbatches) == (None,) * 4


def drop(*path: Any) -> Callable[[Raw], None]:
    """Takes something out."""

    def change(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return change


def put(value: object, *path: Any) -> Callable[[Raw], None]:
    """Puts something in."""

    def change(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return change


def edge(source: int, target: int) -> Callable[[Raw], None]:
    """Adds an edge."""
    return lambda raw: raw["edges"].append(
        {"sourceId": source, "destId": target, "communicationCost": 1.0}
    )


V = ("nodes", 1, "TMPCs", "1", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edge(7, 3), r"form a cycle"),
        (edge(3, 3), r"3 → 3 form a cycle"),
        (edge(3, 7), r"edge 3 → 7 is given twice"),
        (edge(3, 9), r"there is no node 9"),
        (put(7, "nodes", 0, "id"), r"id 7 is given twice"),
        (put([], "nodes"), r"no known format"),
        (drop("edges"), r"no 'edges'"),
        (drop("nodes", 0, "id"), r"no 'id'"),
        (drop("nodes", 0, "TMPCs"), r"node 3 has no 'TMPCs'"),
        (drop("edges", 0, "destId"), r"edges\[0\] has no 'destId'"),
        (drop(*V, "memoryUsageA"), r"TMPCs.1\[0\] has no 'memoryUsageA'"),
        (drop(*V, "syncTimeFw"), r"has no 'syncTimeFw'"),
        (put(-1.0, *V, "timePerSample"), r"timePerSample is -1.0; it must be finite and at least"),
        (put("1", *V, "parameterSize"), r"must be a number"),
        (put({"9": 1.0}, *V, "syncTimeFw"), r"names node 9"),
        (put({"x": 1.0}, *V, "syncTimeFw"), r"'x' is no node id"),
        (put([], "nodes", 0, "TMPCs", "1"), r"TMPCs.1 is empty"),
        (put([variant("v", 1.0)], "nodes", 0, "TMPCs", "0"), r"'0' is no tensor-parallel degree"),
        (put(0, "bandwidth"), r"bandwidth is 0"),
        (put(1.5, "mbsInBatch"), r"must be a whole number"),
        (put("seven", "nodes", 1, "id"), r"an id is a whole number"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Callable[[Raw], None], says: str) -> None:
    raw = copy.deepcopy(GOOD)
    change(raw)
    with pytest.raises(PlanError, match=says):
        read(tmp_path, raw)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"nodes": NaN}', "NaN is no JSON number"),
        ("{}", r"no known format; its keys are \(none\)"),
    ],
)
def test_no_workload_at_all(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        read(tmp_path, text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        read_workload(tmp_path / "nothing.json")
