"""Straight-line Python from a piece of graph.

The program takes its arguments in a list that it empties, and drops every value at its last use,
so that memory goes back as early as eager code would give it back. Gradients can be handed to a
`sink` the moment they exist, which is what lets their exchange overlap with the rest of backward.
Those that are matrix products are handed over before they exist (`raypar.programs.products`), so
that the sink can add them to a sum without memory for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from raypar.compat import OpOverload, raw_callable
from raypar.errors import PlanError
from raypar.programs.partition import Piece
from raypar.programs.products import Deferred, products

Program = Callable[..., list[Any]]
"""``program(box, sink)``: `box` is emptied; returns the outputs that have no sink."""


def compile_piece(
    piece: Piece,
    constants: Mapping[str, torch.Tensor],
    *,
    name: str,
    sinks: Mapping[int, int] | None = None,
) -> Program:
    """Compiles a piece.

    Args:
        piece: What to compile.
        constants: Tensors behind ``get_attr`` nodes.
        name: Shown in tracebacks.
        sinks: Output position → index: these outputs go to ``sink(index, gradient)`` as soon as
            they are made, and are not returned; see `raypar.programs.products.Gradient`.
    """
    return _Writer(piece, constants, dict(sinks or {})).compile(name)


class _Writer:
    def __init__(
        self, piece: Piece, constants: Mapping[str, torch.Tensor], sinks: dict[int, int]
    ) -> None:
        self.piece = piece
        self.constants = constants
        self.space: dict[str, Any] = {}
        self.bound: dict[int, str] = {}
        self.names: dict[fx.Node, str] = {}
        self.lines: list[str] = []
        self.sinks: dict[fx.Node, list[int]] = {}
        self.returned: list[fx.Node | None] = []
        self.products: dict[fx.Node, tuple[int, Deferred]] = {}
        self.skipped: set[fx.Node] = set()
        later = products(piece, sinks)
        for position, product in later.items():
            self.products[product.node] = sinks[position], product
            self.skipped.update(product.views)
        for position, node in enumerate(piece.outputs):
            if position in sinks:
                if isinstance(node, fx.Node) and position not in later:
                    self.sinks.setdefault(node, []).append(sinks[position])
            else:
                self.returned.append(node)

    def compile(self, name: str) -> Program:
        for i, node in enumerate([*self.piece.inputs, *self.piece.nodes]):
            self.names[node] = f"v{i}"
        last = self._last_uses()
        inputs = self.piece.inputs
        if inputs:
            self.lines.append(f"[{', '.join(self.names[n] for n in inputs)}] = box")
        self.lines.append("box.clear()")
        keep = {n for n in self.returned if n is not None}
        self._deliver(inputs)
        self._drop([n for n in inputs if n not in last and n not in keep])
        for node in self.piece.nodes:
            if node in self.skipped:
                continue
            dead = [n for n in dict.fromkeys(node.all_input_nodes) if last.get(n) is node]
            if node in self.products:
                self._hand_over(node)
            else:
                self._call(node)
                self._deliver([node])
                if node not in last:
                    dead.append(node)
            self._drop([n for n in dead if n not in keep])
        self.lines.append(f"return [{', '.join(self._ref(n) for n in self.returned)}]")
        source = "def run(box, sink=None):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(compile(source, f"<raypar {name}>", "exec"), self.space)
        program: Program = self.space["run"]
        return program

    def _last_uses(self) -> dict[fx.Node, fx.Node]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.piece.nodes:
            for i in node.all_input_nodes:
                last[i] = node
        return last

    def _deliver(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            for index in self.sinks.get(node, ()):
                self.lines.append(f"sink({index}, {self.names[node]})")

    def _hand_over(self, node: fx.Node) -> None:
        """Delivers a product that is not made here."""
        index, product = self.products[node]
        operands = ", ".join(self._ref(a) for a in node.args)
        self.lines.append(f"sink({index}, {self._bind(product.form)}({operands}))")

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        if nodes:
            self.lines.append(f"del {', '.join(self.names[n] for n in nodes)}")

    def _call(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.lines.append(
                f"{self.names[node]} = {self._bind(self.constants[str(node.target)])}"
            )
            return
        target = node.target
        function = raw_callable(target) if isinstance(target, OpOverload) else target
        arguments = [self._ref(a) for a in node.args]
        for key, value in node.kwargs.items():
            if not key.isidentifier():  # the only text of a program that is not made here
                raise PlanError(f"{key!r:.80} is no argument's name")
            arguments.append(f"{key}={self._ref(value)}")
        self.lines.append(f"{self.names[node]} = {self._bind(function)}({', '.join(arguments)})")

    def _bind(self, value: Any) -> str:
        key = self.bound.get(id(value))
        if key is None:
            key = self.bound[id(value)] = f"c{len(self.space)}"
            self.space[key] = value
        return key

    def _ref(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, list):
            return f"[{', '.join(self._ref(v) for v in value)}]"
        if isinstance(value, tuple):
            return f"({', '.join(self._ref(v) for v in value)}{',' if len(value) == 1 else ''})"
        if isinstance(value, slice):
            return (
                f"slice({self._ref(value.start)}, {self._ref(value.stop)}, {self._ref(value.step)})"
            )
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._bind(value)
