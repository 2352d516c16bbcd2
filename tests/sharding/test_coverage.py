"""Blocks find their way to the projections, and little of a model is left without a choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.graph.passes.emit import op_name
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.coverage import coverage
from raypar.sharding.strategies import strategies
from raypar.testing import models

TRANSFORMERS = ("llama_own", "t5", "moe_dense", "vit", "hf_mixtral", "mixer", "mlp")
ALIKE = ("gpt", "gpt_dropout", "bert_own", "hf_gpt2", "hf_llama", "hf_t5")
"""Models of the ops of those above."""


class Fused(nn.Module):
    """Attention whose q, k and v come from one projection, taken apart in one of four ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        fused = self.qkv(x)
        if self.way == "view":
            q, k, v = fused.view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = {
                "chunk": lambda: fused.chunk(3, -1),
                "split": lambda: fused.mul(2.0).split(16, -1),
                "slice": lambda: (fused[..., :16], fused[..., 16:32], fused[..., 32:]),
            }[self.way]()
            q, k, v = (p.reshape(b, t, 4, 4).transpose(1, 2) for p in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c)).square().sum()


@pytest.mark.parametrize("way", ["view", "chunk", "split", "slice"])
def test_a_fused_projection_is_cut_over_heads(way: str) -> None:
    graph = rp.capture(lambda: Fused(way), torch.zeros(2, 6, 16)).clean.graph
    annotate_blocks(graph)
    first = next(n for n in graph.nodes if op_name(n) == "linear")
    assert 3 in first.meta["blocks"][2]
    assert "Rg S0/3 S0/3 > S2/3" in [str(s) for s in strategies(first, (2,))]


def test_annotating_again_changes_nothing() -> None:
    graph = rp.capture(lambda: Fused("chunk"), torch.zeros(2, 6, 16)).clean.graph
    annotate_blocks(graph)
    before = {n: n.meta.get("blocks") for n in graph.nodes}
    annotate_blocks(graph)
    assert {n: n.meta.get("blocks") for n in graph.nodes} == before


@pytest.mark.parametrize(
    "name", [*TRANSFORMERS, *(pytest.param(name, marks=pytest.mark.thorough) for name in ALIKE)]
)
def test_less_than_a_hundredth_has_no_choice(name: str) -> None:
    case = models.case(name)
    graph = rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)
    assert coverage(graph).share < 0.01


def test_an_op_without_a_rule_is_named() -> None:
    class Inverts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x).sum()

    found = coverage(rp.capture(Inverts, torch.eye(4)[None].repeat(2, 1, 1)))
    assert "linalg_inv_ex" in found.without_rule or "linalg_inv" in found.without_rule
    assert found.share > 0
    assert "not split" in str(found)
