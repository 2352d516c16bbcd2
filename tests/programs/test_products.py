"""Gradients that are delivered as products of matrices: which, and that they are the gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import raypar
from raypar.programs.products import Gradient, Product, ProductForm, as_tensor
from raypar.programs.slicing import slice_stages
from raypar.programs.stage import StageProgram, compile_stage
from raypar.programs.wire import pack

Delivered = dict[str, Gradient]


class Linears(nn.Module):
    """A bias and a norm, which are no products, between two weights that are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)).tanh()).square().mean()


class Transposed(nn.Module):
    """A weight that lies as it is multiplied, one that is turned, and one under other dims."""

    def __init__(self) -> None:
        super().__init__()
        self.straight = nn.Parameter(torch.randn(6, 10))
        self.turned = nn.Parameter(torch.randn(10, 6))
        self.heads = nn.Parameter(torch.randn(2, 3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x @ self.straight).tanh() @ self.turned
        return (hidden @ self.heads.reshape(6, 6).t()).square().mean()


class Experts(nn.Module):
    """A product for each of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 6, 10))
        self.second = nn.Parameter(torch.randn(3, 6, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.expand(3, *x.shape)
        return torch.bmm(torch.bmm(rows, self.first).tanh(), self.second.mT).square().mean()


class Twice(nn.Module):
    """A weight that is used twice: its gradient is a sum of products."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).tanh()).square().mean()


class Slices(nn.Module):
    """Two weights that are multiplied as one: each gradient is a part of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ torch.cat([self.q, self.k], 1)).tanh().square().mean()


class Half(nn.Module):
    """A weight that is read in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x.float()).float().square().mean()


def deliver(
    make: Callable[[], nn.Module], *, halves: bool = False
) -> tuple[Delivered, Delivered, StageProgram]:
    """What a model's backward hands to its sink, and what autograd makes."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    graph = raypar.capture(make, (x,))
    clean = graph.local(8)
    (stage,), _ = slice_stages(clean, [(0, len(clean.ops))], graph.cloneable, {})
    program = compile_stage(
        pack(stage.graph), name="test", device=torch.device("cpu"), recompute="none",
        trainable=stage.keys("param:"), differentiable=(), outputs_with_grad=[0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = make()
    model(x).backward()
    wanted: Delivered = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    values = {f"param:{n}": p.detach() for n, p in model.named_parameters()}
    given = [values.get(key, x) for key in program.inputs]
    kept = [given[i] for i in program.kept]
    results = program.forward(given)
    found: Delivered = {}

    def sink(index: int, gradient: Gradient) -> None:
        found[program.weight_gradients[index]] = gradient

    box = [*kept, *results[program.n_outputs :], torch.ones((), dtype=results[0].dtype)]
    if halves:
        made = program.backward_input(list(box))
        later = [box[i] for i in program.weight_kept]
        program.backward_weight([*later, *made[program.n_inputs_grad :]], sink)
    else:
        program.backward(box, sink)
    return found, wanted, program


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Linears, {"up.weight", "down.weight"}),
        (Transposed, {"straight", "turned", "heads"}),
        (Experts, {"first", "second"}),
        (Twice, set()),
        (Slices, set()),
        (Half, set()),
    ],
)
def test_products_that_nothing_else_reads_are_handed_over_unmade(
    make: Callable[[], nn.Module], expected: set[str], halves: bool
) -> None:
    found, wanted, program = deliver(make, halves=halves)
    assert {n for n, g in found.items() if isinstance(g, Product)} == expected
    assert found.keys() == wanted.keys()
    tolerance = 1e-2 if make is Half else 1e-12
    for name, gradient in found.items():
        right = as_tensor(wanted[name])
        torch.testing.assert_close(as_tensor(gradient), right, rtol=tolerance, atol=tolerance)
        if isinstance(gradient, Product):
            assert (gradient.dtype, tuple(gradient.shape)) == (right.dtype, tuple(right.shape))
            total = torch.full_like(right, 2.0)
            gradient.add_to(total)
            torch.testing.assert_close(total, right + 2.0)
            gradient.write_to(total)
            torch.testing.assert_close(total, right)
    if not halves:
        order = [program.weight_gradients[j] for j in program.ready_order]
        assert list(found) == order


def test_a_turned_product_lies_as_the_parameter_does() -> None:
    left, right = torch.randn(4, 3), torch.randn(3, 5)
    product = ProductForm((5, 4), turned=True)(left, right)
    made = product.tensor()
    assert made.is_contiguous()
    torch.testing.assert_close(made, (left @ right).t())
