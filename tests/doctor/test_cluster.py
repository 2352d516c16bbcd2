"""Judgements on a cluster's nodes: of facts, so that no Ray is started."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from raypar.doctor import FAIL, OK, WARN
from raypar.doctor.cluster import ClusterReport
from raypar.doctor.nodes import (
    NodeFacts,
    Unreached,
    judge_clocks,
    judge_machines,
    judge_ports,
    judge_software,
)
from raypar.mesh import Cluster, Node, _node_facts, skew
from raypar.mesh.skew import Software, check_skew, disagreements

SOFTWARE = Software("a (10.0.0.1)", "3.11.7", "2.13.0+cu128", "2.60.0", "0.1.0", "little")


def node(name: str = "a", **changes: Any) -> NodeFacts:
    software = {k: changes.pop(k) for k in ("python", "torch", "ray", "raypar") if k in changes}
    facts = NodeFacts(
        node_id=name * 56,
        address=f"10.0.0.{ord(name) - 96}",
        host=name,
        software=dataclasses.replace(SOFTWARE, where=name, **software),
        cores=8,
        gpus=("H100",),
        driver="550.54",
        driver_cuda=(12, 8),
        torch_cuda="12.8",
        nccl="2.27.5",
        shm_free=4 << 30,
        source="abc",
    )
    return dataclasses.replace(facts, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"torch": "2.13.0+cpu"}, None),
        ({"python": "3.11.2"}, None),
        ({"python": "3.12.0"}, "python: 3.11 on a, 3.12 on b"),
        ({"torch": "2.12.1"}, "torch: 2.13.0 on a, 2.12.1 on b"),
        ({"ray": "2.60.1"}, "ray: 2.60.0 on a, 2.60.1 on b"),
        ({"raypar": "0.2.0"}, "raypar: 0.1.0 on a, 0.2.0 on b"),
    ],
)
def test_versions(changes: dict[str, str], problem: str | None) -> None:
    nodes = [node(), node("b", **changes)]
    assert disagreements(n.software for n in nodes) == ([problem] if problem else [])
    (finding,) = judge_software(nodes)
    assert finding.status == (FAIL if problem else OK)
    assert problem is None or finding.found == problem


def test_a_node_without_raypar_is_told_first() -> None:
    (finding,) = judge_software([node(), node("b", raypar=None, torch=None)])
    assert finding.status == FAIL
    assert "missing on b (10.0.0.2)" in finding.found
    assert "runtime_env" in finding.mend


def test_equal_versions_of_other_code() -> None:
    findings = judge_software([node(), node("b", source="def")])
    assert [f.status for f in findings] == [OK, WARN]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, OK),
        ({"driver_cuda": (13, 0)}, OK),
        ({"driver_cuda": (12, 2)}, WARN),
        ({"driver_cuda": (11, 8)}, FAIL),
        ({"driver_cuda": None}, FAIL),
        ({"torch_cuda": None}, FAIL),
    ],
)
def test_drivers(changes: dict[str, Any], status: str) -> None:
    found = {f.name: f for f in judge_machines([node(**changes)])}
    finding = found["driver of a (10.0.0.1)"]
    assert finding.status == status
    assert (status == OK) == (finding.mend == "")


def test_nccl_shm_and_clocks() -> None:
    odd = node("b", nccl="2.26.2", shm_free=64 << 20, clock_s=-2.0, clock_within_s=0.01)
    found = {f.name: f for f in judge_machines([node(), odd])}
    assert found["NCCL"].status == FAIL
    assert found["/dev/shm of a (10.0.0.1)"].status == OK
    assert found["/dev/shm of b (10.0.0.2)"].status == WARN
    (clocks,) = judge_clocks([node(), odd])
    assert clocks.status == WARN
    assert "b (10.0.0.2) -2.00 s" in clocks.found
    unsure = node("b", clock_s=-2.0, clock_within_s=1.9)
    assert judge_clocks([node(), unsure])[0].status == OK
    assert "NCCL" not in {f.name for f in judge_machines([node(gpus=())])}


def test_ports_and_the_json_form() -> None:
    failed = [Unreached("10.0.0.1", "10.0.0.2", 4000, "timed out")] * 9
    finding = judge_ports(2, failed)
    assert finding.status == FAIL
    assert "9 connections failed: 10.0.0.1 → 10.0.0.2:4000: timed out" in finding.found
    assert "3 more" in finding.found
    assert judge_ports(2, []).status == OK
    plain = json.loads(ClusterReport((node(),), (finding,), tuple(failed)).to_json())
    assert plain["nodes"][0]["software"]["torch"] == "2.13.0+cu128"
    assert plain["findings"][0]["status"] == FAIL


def test_a_cluster_that_is_no_ray_is_not_asked() -> None:
    (here,) = check_skew(Cluster((Node.of("CPU", 2, name="x"), Node.of("CPU", 2, name="y"))))
    assert here.raypar is not None
    assert here.torch is not None


def test_disagreement_stops_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(SOFTWARE, where="y", torch="2.12.0", raypar=None)
    monkeypatch.setattr(skew, "_ask", lambda ids, names, deadline_s: [SOFTWARE, other])
    cluster = Cluster(
        (Node.of("CPU", 2, name="x", id="1" * 56), Node.of("CPU", 2, name="y", id="2" * 56))
    )
    with pytest.raises(Exception, match="cannot run one program together") as caught:
        check_skew(cluster)
    text = str(caught.value)
    assert "raypar: " in text
    assert "none on y" in text
    assert "2.12.0 on y" in text
    assert "pip=['torch==" in text


def test_what_a_node_tells_of_itself() -> None:
    found = _node_facts.NodeProbe().look()
    assert found["raypar"]
    assert found["source"] == _node_facts._source_digest()
    probe, other = _node_facts.NodeProbe(), _node_facts.NodeProbe()
    host, ports, problem = probe.open("127.0.0.2", "127.0.0.0/8", [0, 0])
    assert (host, len(ports), problem) == ("127.0.0.2", 2, "")
    taken = other.open("127.0.0.2", None, ports[:1])
    assert "cannot listen at 127.0.0.2" in taken[2]
    said = other.dial([("127.0.0.2", ports[0]), ("127.0.0.1", ports[1])], 2.0)
    assert said[0] == ""
    assert "refused" in said[1]
    assert "does not have" in other.open("127.0.0.2", "eth99", [0])[2]
    for listener in probe._listeners:
        listener.close()
