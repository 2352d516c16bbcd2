"""Code that skips an expand where the batch already has that size."""

import torch
from torch import nn

from raypar.graph.capture import capture
from raypar.mesh.cluster import Cluster
from raypar.testing import assert_plan_equivalent, random_plan


class _SkipsExpand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4, dtype=torch.float64)
        self.out = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(4)[None]
        if places.shape[0] != x.shape[0]:
            places = places.expand(x.shape[0], -1)
        return self.out(self.table(places) * x[..., None]).square().mean()


def test_a_batch_of_one_has_the_same_ops():
    x = torch.randn(8, 4, dtype=torch.float64)
    graph = capture(_SkipsExpand, x)
    assert graph.analysis.exact
    assert [n.meta["id"] for n in graph.at(1).ops] == [op.id for op in graph.ops]
    plan = random_plan(graph, Cluster.local(4), seed=0, microbatches=8, replicas=1)
    assert_plan_equivalent(_SkipsExpand, x, plan)
