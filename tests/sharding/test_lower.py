"""Lowered graphs compute what the whole graph computes, forward and backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import raypar as rp
from raypar.graph.opgraph import OpGraph
from raypar.graph.origins import fetch_tensor
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.lower import held_spec, readings
from raypar.testing import models
from tests._tiers import examples
from tests.sharding.lowering import random_strategies, run_lowered, run_whole

MESHES = ((2,), (4,), (2, 2))
NAMES = ("gpt", "mlp", "t5", "cnn", "moe_dense", "gpt_dropout", "hf_gpt2")


@cache
def _captured(name: str) -> OpGraph:
    case = models.case(name)
    return rp.capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


def _values(name: str) -> dict[str, torch.Tensor]:
    case, graph = models.case(name), _captured(name)
    torch.manual_seed(0)
    model = case.model_fn(seed=0)
    tensors = models.tensors(case.batch(seed=0))
    values = {f"param:{n}": p.detach() for n, p in model.named_parameters()}
    values |= {f"buffer:{n}": b for n, b in model.named_buffers()}
    values |= {f"in:{i}": t for i, t in enumerate(tensors)}
    for key in graph.clean.constants:
        found = graph.constant(key)
        values[f"const:{key}" if not key.startswith("const:") else key] = (
            found if isinstance(found, torch.Tensor) else fetch_tensor(model, found)
        )
    values["rng"] = torch.tensor([7, 3, 0])
    return values


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "name",
    # T5 is in the law on meshes, and GPT-2 has the ops of "gpt".
    [
        pytest.param(name, marks=[pytest.mark.thorough] * (name in ("t5", "hf_gpt2")))
        for name in NAMES
    ],
)
def test_any_strategy_per_op_gives_the_whole_result(name: str, mesh: tuple[int, ...]) -> None:
    graph, values = _captured(name), _values(name)
    clean = graph.local(graph.global_batch)
    annotate_blocks(clean.graph)
    wanted = run_whole(clean.graph, values)
    axes = tuple(zip("xyz", mesh, strict=False))
    near = 1e-5 if models.case(name).fp32_ops else 1e-9
    for seed in range(examples(1, 2)):
        chosen = random_strategies(clean.graph, mesh, seed)
        held = {
            k.removeprefix("param:"): held_spec(specs, len(mesh))
            for k, specs in readings(clean.graph, chosen).items()
            if k.startswith("param:")
        }
        found = run_lowered(clean.graph, chosen, axes, values, held)
        torch.testing.assert_close(found.loss, wanted.loss, rtol=near, atol=near)
        for key, gradient in wanted.gradients.items():
            torch.testing.assert_close(
                found.gradients[key],
                gradient,
                rtol=near,
                atol=near,
                msg=lambda m, k=key: f"{k}: {m}",
            )
