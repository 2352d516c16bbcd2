"""Ways to run units on a mesh: where memory is tight, also those that store the least."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster, Node
from raypar.mesh.devices import device_kind
from raypar.search.config import SearchConfig
from raypar.search.interop.pipeline import Way
from raypar.search.interop.shardings import LEAN
from raypar.search.interop.space import Split
from raypar.search.interop.ways import WayKey
from raypar.search.interop.workbench import Workbench

WIDTH, LAYERS, SAMPLES, DEVICES, MICROBATCHES = 1024, 6, 8192, 4, 128


def _graph() -> OpGraph:
    def model() -> nn.Module:
        parts = [[nn.Linear(WIDTH, WIDTH), nn.GELU()] for _ in range(LAYERS)]
        return nn.Sequential(*[nn.Sequential(*two) for two in parts]).half()

    rows = torch.zeros(1, WIDTH, dtype=torch.half).expand(SAMPLES, -1)
    return capture(model, (rows, torch.zeros(SAMPLES, dtype=torch.long)), F.cross_entropy)


def _ways(memory: int) -> dict[str, Way]:
    """Mode → the way without ZeRO and recomputation, over one axis of all devices."""
    kind = dataclasses.replace(device_kind("L4"), memory=memory)
    cluster = Cluster((Node.of(kind, DEVICES, name="node0"),))
    config = SearchConfig(zero=0, recompute="none", memory_fraction=1.0)
    bench = Workbench(_graph(), cluster, config, table_calibration(cluster))
    split = Split(1, MICROBATCHES, SAMPLES // MICROBATCHES, DEVICES)
    found = bench.maker.ways(split, DEVICES, bench.line)
    keys = [(way, cast(WayKey, way.key)) for way in found]
    return {key.modes[0]: way for way, key in keys if len(key.shape) == 1}


def test_where_memory_is_tight_some_ways_store_less() -> None:
    tight = _ways(memory=1 << 26)
    lean, fastest = tight[LEAN], tight["free"]
    assert lean.fixed.sum() < fastest.fixed.sum() / 2
    assert lean.seconds.sum() > fastest.seconds.sum()


def test_where_there_is_room_no_way_has_to_be_lean() -> None:
    assert set(_ways(memory=64 << 30)) == {"free", "tensor"}
