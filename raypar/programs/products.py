"""Gradients of parameters that are matrix products, so that they can be added to their sum at once.

The gradient of a linear layer's weight is one product. Made on its own and then added up, it is
written, read again, and the sum is read and written: four times its bytes in every microbatch, and
memory for it. A product that is given the sum adds to it while it is made: the sum is read and
written once, and there is nothing else. Megatron-LM has the same under the name of
`gradient_accumulation_fusion`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from raypar.graph.passes.emit import aten
from raypar.programs.partition import Piece

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_VIEWS = (
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.alias.default, aten.detach.default,
)  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """A gradient that is not made yet: the product of two matrices, or of two stacks of them.

    Attributes:
        left: (rows, inner), or (stack, rows, inner).
        right: (inner, columns), or (stack, inner, columns).
        shape: Of the gradient: the product's elements in their order, under other dims.
    """

    left: torch.Tensor
    right: torch.Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradient."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Where it will be."""
        return self.left.device

    @property
    def is_matrix(self) -> bool:
        """Whether the gradient is what the two matrices make, and no other view of it."""
        return self.shape == (self.left.shape[-2], self.right.shape[-1])

    @property
    def transposed(self) -> Product:
        """The transpose of a gradient that `is_matrix`."""
        return Product(self.right.mT, self.left.mT, self.shape[::-1])

    def tensor(self) -> torch.Tensor:
        """The gradient, in memory of its own."""
        multiply = torch.mm if self.left.dim() == 2 else torch.bmm
        return multiply(self.left, self.right).view(self.shape)

    def write_to(self, target: torch.Tensor) -> None:
        """Makes it in `target`, which is contiguous, of its shape and dtype."""
        multiply = torch.mm if self.left.dim() == 2 else torch.bmm
        multiply(self.left, self.right, out=self._as_matrix(target))

    def add_to(self, target: torch.Tensor) -> None:
        """Adds it to `target`, which is contiguous, of its shape and dtype."""
        matrix = self._as_matrix(target)
        if matrix.dim() == 2:
            matrix.addmm_(self.left, self.right)
        else:
            matrix.baddbmm_(self.left, self.right)

    def _as_matrix(self, target: torch.Tensor) -> torch.Tensor:
        return target.view(*self.left.shape[:-1], self.right.shape[-1])


Gradient = torch.Tensor | Product
"""What a program hands to a sink."""


def as_tensor(gradient: Gradient) -> torch.Tensor:
    """A gradient as a tensor: made now, where it is a product."""
    return gradient.tensor() if isinstance(gradient, Product) else gradient


@dataclass(frozen=True, slots=True)
class ProductForm:
    """What makes a `Product` of the operands of one call.

    Attributes:
        shape: Shape of the gradient.
        turned: The gradient's elements lie as those of the transposed product.
    """

    shape: tuple[int, ...]
    turned: bool

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> Product:
        """The gradient."""
        if self.turned:
            left, right = right.mT, left.mT
        return Product(left, right, self.shape)


class Deferred(NamedTuple):
    """A gradient that a program delivers as a product.

    Attributes:
        node: The product in its graph, which is not run; its operands are the node's.
        views: What follows it up to the gradient. None of it is run either.
        form: What makes the gradient of the operands.
    """

    node: fx.Node
    views: tuple[fx.Node, ...]
    form: ProductForm


def products(piece: Piece, positions: Collection[int]) -> dict[int, Deferred]:
    """Which outputs of a piece are products that nothing else reads.

    Args:
        piece: A program.
        positions: Outputs to look at.

    Returns:
        Position → how to deliver it.
    """
    inside = set(piece.nodes)
    uses: dict[fx.Node, int] = {}
    for reader in piece.nodes:
        for node in reader.all_input_nodes:
            uses[node] = uses.get(node, 0) + 1
    for output in piece.outputs:
        if output is not None:
            uses[output] = uses.get(output, 0) + 1
    found = {}
    for position in positions:
        output = piece.outputs[position]
        deferred = None if output is None else _deferred(output, inside, uses)
        if deferred is not None:
            found[position] = deferred
    return found


def _deferred(output: fx.Node, inside: set[fx.Node], uses: dict[fx.Node, int]) -> Deferred | None:
    views: list[fx.Node] = []
    node = output
    while node in inside and uses[node] == 1 and node.target in _VIEWS:
        views.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if node not in inside or uses[node] != 1 or node.target not in _PRODUCTS:
        return None
    chain = tuple(reversed(views))
    product, wanted = node.meta["val"], output.meta["val"]
    shape = tuple(wanted.shape)
    if wanted.dtype != product.dtype:
        return None
    for turned in (False, True):
        if _in_order(tuple(product.shape), chain, turned):
            return Deferred(node, chain, ProductForm(shape, turned))
    return None


def _in_order(shape: Sequence[int], views: Sequence[fx.Node], turned: bool) -> bool:
    """Whether the gradient lies in one piece where the product (turned: transposed) does."""
    value: Any = torch.empty(shape, device="meta")
    if turned:
        value = torch.empty((*shape[:-2], shape[-1], shape[-2]), device="meta").mT
    try:
        for view in views:
            target: Any = view.target
            value = target(value, *view.args[1:], **view.kwargs)
    except RuntimeError:  # no view of a product that lies so
        return False
    return bool(value.is_contiguous())
