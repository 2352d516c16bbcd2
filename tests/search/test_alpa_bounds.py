"""What alpa leaves out without looking cannot win, and unequal devices get unequal stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import DEVICES
from raypar.search.config import SearchConfig
from raypar.search.interop.space import line_of_devices
from raypar.search.planners.alpa import AlpaSearch

A100, L4 = DEVICES["A100-80"], DEVICES["L4"]


def _graph(layers: int = 6, width: int = 8192, batch: int = 65536) -> OpGraph:
    def model() -> nn.Module:
        parts = [[nn.Linear(width, width), nn.GELU()] for _ in range(layers)]
        return nn.Sequential(*[nn.Sequential(*two) for two in parts]).half()

    rows = torch.zeros(1, width, dtype=torch.half).expand(batch, -1)
    return capture(model, (rows, torch.zeros(batch, dtype=torch.long)), F.cross_entropy)


def _cluster(*kinds: tuple[str, float], devices: int = 2) -> Cluster:
    nodes = [
        Node.of(DEVICES[name].at_speed(speed), devices, name=f"node{i}")
        for i, (name, speed) in enumerate(kinds)
    ]
    return Cluster(tuple(nodes))


@pytest.mark.parametrize(
    "cluster",
    [_cluster(("A100-80", 1), ("A100-80", 1)), _cluster(("A100-80", 1), ("A100-80", 0.25))],
    ids=["alike", "unlike"],
)
def test_no_pipeline_goes_below_the_bound(cluster: Cluster) -> None:
    search = AlpaSearch(
        _graph(), cluster, SearchConfig(microbatches=16), table_calibration(cluster)
    )
    search.search()
    assert search.kept
    for candidate in search.kept:
        sizes = {stage.devices for stage in candidate.pipeline.stages}
        least = min(search._least(candidate.split, size) for size in sizes)
        assert 0 < least <= candidate.step_s * (1 + 1e-9)


def test_a_slow_node_is_not_the_pace_of_all() -> None:
    graph = _graph()
    mixed = _cluster(("A100-80", 1), ("A100-80", 0.25))
    slow = _cluster(("A100-80", 0.25), ("A100-80", 0.25))
    best = [
        AlpaSearch(
            graph, cluster, SearchConfig(microbatches=16), table_calibration(cluster)
        ).search()[0]
        for cluster in (mixed, slow)
    ]
    assert best[0].step_s < 0.75 * best[1].step_s


def test_devices_with_most_memory_stand_first() -> None:
    cluster = Cluster((Node.of(L4, 2, name="a"), Node.of(A100, 1, name="b")))
    assert line_of_devices(cluster) == [2, 0, 1]
