"""A graph of one op, run whole and with every strategy that the op has."""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from raypar.compat import FakeTensorMode, pytree
from raypar.graph.passes.emit import aten
from raypar.sharding.lower import held_spec, readings
from raypar.sharding.rules.base import Strategy
from raypar.sharding.strategies import strategies, whole
from raypar.testing.rules import check_rule
from tests.sharding.lowering import run_lowered, run_whole

MESHES = ((2,), (4,), (2, 2))


@dataclass(frozen=True)
class Fixed:
    """A floating-point argument that gets no gradient."""

    value: torch.Tensor


@dataclass(frozen=True)
class Made:
    """An argument that the graph itself makes, as offsets in equal steps."""

    target: Any
    args: tuple[Any, ...]


class OneOp:
    """``weighted sum of all results of target(*args)`` as a graph.

    Attributes:
        graph: The graph; its output is a scalar that gets a gradient.
        node: The op.
        values: Tensor of every placeholder, by id.
    """

    def __init__(
        self, target: Any, *args: Any, results: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        self.graph = fx.Graph()
        self.values: dict[str, torch.Tensor] = {}
        self.mode = FakeTensorMode()
        leaves, form = pytree.tree_flatten((args, kwargs))
        call_args, call_kwargs = pytree.tree_unflatten([self._argument(v) for v in leaves], form)
        scale = self._placeholder("param:scale", torch.ones((), dtype=torch.float64))
        self.node = self._call(target, *call_args, **call_kwargs)
        value = self.node.meta["val"]
        pieces = [self.node]
        if isinstance(value, (list, tuple)):
            wanted = range(len(value)) if results is None else results
            pieces = [self._call(operator.getitem, self.node, i) for i in wanted]
        generator = torch.Generator().manual_seed(0)
        total = scale
        for i, piece in enumerate(pieces):
            shape = piece.meta["val"].shape
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            weight = self._placeholder(f"in:weight{i}", drawn)
            part = self._call(aten.to.dtype, piece, torch.float64)
            part = self._call(aten.sum.default, self._call(aten.mul.Tensor, part, weight))
            total = self._call(aten.add.Tensor, total, self._call(aten.mul.Tensor, part, scale))
        self.graph.output((total,))

    def _placeholder(self, key: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(key.replace(":", "_"))
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        if calls:
            calls[0].prepend(node)
        node.meta = {"id": key, "val": self.mode.from_tensor(value)}
        self.values[key] = value
        return node

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, Made):
            return self._call(leaf.target, *leaf.args)
        if isinstance(leaf, Fixed):
            return self._placeholder(f"in:{len(self.values)}", leaf.value)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        kind = "param" if leaf.is_floating_point() else "in"
        return self._placeholder(f"{kind}:{len(self.values)}", leaf)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = pytree.tree_map(
            lambda v: v.meta["val"] if isinstance(v, fx.Node) else v, (args, kwargs)
        )
        with self.mode, torch.no_grad():
            value = target(*fake_args, **fake_kwargs)
        node.meta = {"id": f"m/{node.name}", "val": value}
        return node

    def texts(self, size: int = 2) -> list[str]:
        """Every strategy on one axis but the first, which is whole."""
        return [str(s) for s in strategies(self.node, (size,))[1:]]

    def check(self, meshes: Sequence[tuple[int, ...]] = MESHES, most: int = 16) -> None:
        """Every strategy (`most` at random on each mesh) gives the whole op's result."""
        wanted = run_whole(self.graph, self.values)
        for mesh in meshes:
            options = strategies(self.node, mesh)[1:]
            if len(options) > most:
                options = random.Random(0).sample(options, most)
            for option in options:
                self._check_one(mesh, option, wanted.loss, wanted.gradients)

    def _check_one(
        self,
        mesh: tuple[int, ...],
        option: Strategy,
        loss: torch.Tensor,
        gradients: dict[str, torch.Tensor],
    ) -> None:
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        chosen = {n: whole(n, len(mesh)) for n in calls if n.target is not operator.getitem}
        chosen[self.node] = option
        held = {
            key.removeprefix("param:"): held_spec(specs, len(mesh))
            for key, specs in readings(self.graph, chosen).items()
            if key.startswith("param:")
        }
        axes = tuple(zip("xyz", mesh, strict=False))
        where = f"{self.node.target} as {option} on {mesh}"
        try:
            found = run_lowered(self.graph, chosen, axes, self.values, held)
        except Exception as error:
            raise AssertionError(f"{where}: {error}") from error
        self._compare(f"{where}: result", found.loss, loss)
        for key, gradient in gradients.items():
            self._compare(f"{where}: gradient of {key}", found.gradients[key], gradient)

    def _compare(self, what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(
            found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}"
        )


def check_op(target: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Checks an op on `MESHES`; gives its strategies on an axis of 2.

    `check_rule` does it, unless an argument is `Fixed` or `Made`, which only `OneOp` knows.
    """
    op = OneOp(target, *args, **kwargs)
    if any(isinstance(leaf, (Fixed, Made)) for leaf in pytree.tree_leaves((args, kwargs))):
        op.check()
    else:
        check_rule(target, args, kwargs, meshes=MESHES, most=16)
    return op.texts()


def real(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 numbers."""
    generator = torch.Generator().manual_seed(seed + sum(n << i for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole_numbers(below: int, *shape: int) -> torch.Tensor:
    """Random integers from 0."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))
