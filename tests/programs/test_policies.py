"""Recompute policies and the split of backward change memory, never a bit of a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import raypar
from raypar.plan import RECOMPUTE_POLICIES
from raypar.programs.products import as_tensor
from raypar.programs.slicing import slice_stages
from raypar.programs.stage import compile_stage
from raypar.programs.wire import pack

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        h = x
        for _ in range(2):
            h = h + nn.functional.dropout(self.down(nn.functional.gelu(self.up(self.norm(h)))), 0.1)
        return h.square().mean()


@pytest.fixture
def stage():
    graph = raypar.capture(Model, (torch.zeros(8, 16),))
    clean = graph.local(8)
    (found,), _ = slice_stages(clean, [(0, len(clean.ops))], graph.cloneable, {})
    return found


def program(stage, policy):
    return compile_stage(
        pack(stage.graph), name="test", device=CPU, recompute=policy,
        trainable=stage.keys("param:"), differentiable=(), outputs_with_grad=[0],
    )  # fmt: skip


def arguments(compiled):
    torch.manual_seed(0)
    params = {f"param:{n}": p.detach() for n, p in Model().named_parameters()}
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    fixed = {"in:0": x, "rng": torch.tensor([5, 2, 0])}
    return [params.get(k, fixed.get(k)) for k in compiled.inputs]


def run(compiled, *, halves=False):
    given = arguments(compiled)
    kept = [given[i] for i in compiled.kept]
    results = compiled.forward(list(given))
    saved = results[compiled.n_outputs :]
    box = [*kept, *saved, torch.ones(())]
    gradients = {}

    def sink(index, value):
        gradients[compiled.weight_gradients[index]] = as_tensor(value)

    if halves:
        results_in = compiled.backward_input(list(box))
        between = results_in[compiled.n_inputs_grad :]
        weight = [box[i] for i in compiled.weight_kept] + between
        compiled.backward_weight(weight, sink)
        assert not weight  # the box is emptied
    else:
        compiled.backward(box, sink)
        assert not box
    return results[0], gradients, saved


def test_policies_give_bit_equal_gradients(stage):
    loss, wanted, _ = run(program(stage, "none"))
    assert set(wanted) == {n for n, _ in Model().named_parameters()}
    for policy in RECOMPUTE_POLICIES:
        for halves in (False, True):
            again, found, _ = run(program(stage, policy), halves=halves)
            assert torch.equal(again, loss)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_policies_save_less_and_less(stage):
    sizes = [program(stage, p).saved_bytes for p in ("none", "selective", "full")]
    assert sizes[0] > sizes[1] > sizes[2] == 0


@pytest.mark.parametrize("policy", RECOMPUTE_POLICIES)
def test_saved_bytes_are_as_predicted(stage, policy):
    compiled = program(stage, policy)
    given = arguments(compiled)
    held = {t.untyped_storage().data_ptr() for t in given}
    _, _, saved = run(compiled)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    measured = sum(n for pointer, n in storages.items() if pointer not in held)
    assert compiled.saved_bytes == pytest.approx(measured, rel=0.05)


def test_gradients_come_in_the_announced_order(stage):
    compiled = program(stage, "none")
    given = arguments(compiled)
    kept = [given[i] for i in compiled.kept]
    saved = compiled.forward(list(given))[compiled.n_outputs :]
    order = []
    compiled.backward([*kept, *saved, torch.ones(())], lambda index, _: order.append(index))
    assert order == compiled.ready_order
