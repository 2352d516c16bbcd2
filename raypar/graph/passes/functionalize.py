"""In-place writes become functional ones, also through views, so that the graph is pure.

Tensors that share a storage form a group. A write through a view builds the view's new value,
puts it back into each parent up to the group's base (slice → slice_scatter, ...), and later reads
of any alias take their view again from the new base.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from raypar.compat import (
    OpOverload,
    form_without_out,
    is_mutable,
    overload_name,
    storage_id,
    written_arguments,
)
from raypar.errors import CaptureError
from raypar.graph.passes.emit import Emitter, aten, bound_args, is_op, op_name

RANDOM_FILLS = frozenset({"bernoulli_", "uniform_", "normal_", "exponential_", "random_"})

_OPERATOR_NAMES = {
    "__ior__": "bitwise_or",
    "__iand__": "bitwise_and",
    "__ixor__": "bitwise_xor",
    "__ilshift__": "__lshift__",
    "__irshift__": "__rshift__",
}


@dataclass
class _Group:
    base: fx.Node
    version: int = 0
    current: dict[fx.Node, tuple[int, fx.Node]] = field(default_factory=dict)


def functionalize(
    graph: fx.Graph, params: dict[str, fx.Node], buffers: dict[str, fx.Node]
) -> dict[str, fx.Node]:
    """Removes every in-place write.

    Returns:
        Buffer name → node of its value after the forward pass, for buffers that change.

    Raises:
        CaptureError: A parameter is written, or a write goes through a view that cannot be undone.
    """
    _retarget_view_changes(graph)
    keys = _alias_keys(graph)
    groups = _written_groups(graph, keys)
    owner = {node: name for name, node in params.items()}
    for group in groups.values():
        if group.base in owner:
            raise CaptureError(
                f"the forward pass writes to parameter {owner[group.base]!r} in place; clone it "
                "first, or register it as a buffer"
            )
    if not groups:
        return {}
    rewriter = _Rewriter(graph, groups, keys)
    for node in list(graph.nodes):
        if node.op != "placeholder":
            rewriter.visit(node)
    for node in reversed(rewriter.aliases):
        graph.erase_node(node)
    updates = {}
    for name, node in buffers.items():
        found = rewriter.group_of(node)
        if found is not None and found.version:
            updates[name] = found.current[found.base][1]
    return updates


_VIEW_CHANGES = {
    "transpose_": aten.transpose.int,
    "swapaxes_": aten.transpose.int,
    "swapdims_": aten.transpose.int,
    "t_": aten.t.default,
    "unsqueeze_": aten.unsqueeze.default,
}


def _retarget_view_changes(graph: fx.Graph) -> None:
    """Ops that change how a tensor is seen, not what it holds, become views of it."""
    for node in graph.nodes:
        if is_op(node) and op_name(node) in _VIEW_CHANGES:
            node.target = _VIEW_CHANGES[op_name(node)]
            seen = node.args[0]
            after = False
            for later in list(graph.nodes):
                if after and seen in later.all_input_nodes:
                    later.replace_input_with(seen, node)
                after = after or later is node


Key = int | fx.Node
"""What aliases share: a storage, or one piece of an op whose pieces count as separate."""


def _alias_keys(graph: fx.Graph) -> dict[fx.Node, Key]:
    keys: dict[fx.Node, Key] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        items = value if isinstance(value, (list, tuple)) else [value]
        tensors = [item for item in items if isinstance(item, torch.Tensor)]
        if not tensors:
            continue
        key: Key = storage_id(tensors[0])
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in keys:
            if node.target is operator.getitem and op_name(source).startswith("unsafe_"):
                key = node  # unsafe_split and its like promise that nobody minds the sharing
            elif storage_id(_some_tensor(source)) == key:
                key = keys[source]
        keys[node] = key
    return keys


def _some_tensor(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return next(item for item in value if isinstance(item, torch.Tensor))
    assert isinstance(value, torch.Tensor)
    return value


def _written_groups(graph: fx.Graph, keys: dict[fx.Node, Key]) -> dict[Key, _Group]:
    first: dict[Key, fx.Node] = {}
    written: dict[Key, _Group] = {}
    for node in graph.nodes:
        if node in keys:
            first.setdefault(keys[node], node)
        if is_op(node) and is_mutable(node.target):
            for target in _written_args(node):
                written.setdefault(keys[target], _Group(first[keys[target]]))
    return written


def _written_args(node: fx.Node) -> list[fx.Node]:
    found = []
    bound = bound_args(node)
    for name in written_arguments(node.target):  # type: ignore[arg-type]
        value = bound[name]
        if not isinstance(value, fx.Node):
            raise CaptureError(
                f"{node.meta.get('source')}: {op_name(node)} writes to a list of tensors, "
                "which cannot be captured; write to one tensor at a time"
            )
        found.append(value)
    return found


def _parent(node: fx.Node) -> fx.Node | None:
    """The node that `node` is a view of; for a piece, the node that was cut into pieces."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if node.target is operator.getitem and isinstance(first, fx.Node):
        return first.args[0] if isinstance(first.args[0], fx.Node) else None
    return first if isinstance(first, fx.Node) else None


class _Rewriter:
    """Walks the graph once; original nodes resolve to the newest value of what they alias."""

    def __init__(
        self, graph: fx.Graph, groups: dict[Key, _Group], keys: dict[fx.Node, Key]
    ) -> None:
        self.graph = graph
        self.groups = groups
        self.keys = keys
        # Read before any argument is redirected: views are views of *original* nodes.
        self.parents = {node: _parent(node) for node in graph.nodes}
        self.aliases: dict[fx.Node, fx.Node] = {}  # in-place op → the alias it wrote to
        self.made: set[fx.Node] = set()

    def group_of(self, node: fx.Node) -> _Group | None:
        key = self.keys.get(node)
        return None if key is None else self.groups.get(key)

    def original(self, node: fx.Node) -> fx.Node:
        while node in self.aliases:
            node = self.aliases[node]
        return node

    def visit(self, node: fx.Node) -> None:
        writes = isinstance(node.target, OpOverload) and is_mutable(node.target)
        targets = [self.original(t) for t in _written_args(node)] if writes else []

        def fresh(arg: fx.Node) -> fx.Node:
            return arg if arg in self.made else self.newest(self.original(arg), node)

        node.args = fx.map_arg(node.args, fresh)
        node.kwargs = fx.map_arg(node.kwargs, fresh)
        if not writes:
            # Its arguments are the newest ones now, so this is the newest form of this view: where
            # it is taken anew must not depend on whether it happens to be a view or a copy.
            group = self.group_of(node)
            if group is not None and group.version and node is not group.base:
                group.current[node] = (group.version, node)
            return
        if len(targets) != 1:
            raise CaptureError(
                f"{node.meta.get('source')}: {op_name(node)} writes to its arguments in a way "
                "that cannot be captured; use the out-of-place op"
            )
        emit = Emitter(self.graph, node)
        value = _functional_value(emit, node)
        self.made.add(value)
        self.write(emit, targets[0], value)
        self.aliases[node] = targets[0]

    def newest(self, node: fx.Node, anchor: fx.Node) -> fx.Node:
        """The present value of an original alias, made in front of `anchor` if need be."""
        group = self.group_of(node)
        if group is None or not group.version:
            return node
        known = group.current.get(node)
        if node is group.base:
            return node if known is None else known[1]
        if known is not None and known[0] == group.version:
            return known[1]
        parent = self.parents.get(node)
        if parent is None:
            return node
        source = self.newest(self.original(parent), anchor)
        emit = Emitter(self.graph, anchor)
        if node.target is operator.getitem:
            pieces = node.args[0]
            assert isinstance(pieces, fx.Node)
            source = emit(pieces.target, source, *pieces.args[1:], **pieces.kwargs)
            self.made.add(source)
            index = node.args[1]
            fresh = emit(operator.getitem, source, index, like=source.meta["val"][index])
        else:
            fresh = emit(node.target, source, *node.args[1:], **node.kwargs)
        self.made.add(fresh)
        group.current[node] = (group.version, fresh)
        return fresh

    def write(self, emit: Emitter, view: fx.Node, value: fx.Node) -> None:
        """Puts `value` into the alias `view` and into every parent up to the base."""
        group = self.group_of(view)
        assert group is not None
        path = [view]
        while path[-1] is not group.base:
            parent = self.parents.get(path[-1])
            if parent is None or self.group_of(self.original(parent)) is not group:
                break
            path.append(self.original(parent))
        before = [self.newest(node, emit.anchor) for node in path[1:]]
        group.version += 1
        group.current[view] = (group.version, value)
        for child, parent, old in zip(path, path[1:], before, strict=False):
            value = _put_back(emit, child, old, value)
            self.made.add(value)
            group.current[parent] = (group.version, value)


def _functional_value(emit: Emitter, node: fx.Node) -> fx.Node:
    name = op_name(node)
    out = node.kwargs.get("out")
    base = node.args[0] if out is None else out
    if not isinstance(base, fx.Node):
        raise CaptureError(
            f"{node.meta.get('source')}: {name} writes to its arguments in a way that cannot be "
            "captured; use the out-of-place op"
        )
    old = base.meta["val"]
    shape, dtype = list(old.shape), old.dtype
    if name == "copy_":
        source = node.args[1]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != dtype:
            source = emit(aten.to.dtype, source, dtype)
        return emit(aten.expand.default, source, shape)
    if name == "zero_":
        return emit(aten.zeros_like.default, base)
    if name == "fill_" and not isinstance(node.args[1], fx.Node):
        return emit(aten.full_like.default, base, node.args[1])
    if name == "detach_":
        return emit(aten.detach.default, base)
    if name in RANDOM_FILLS:
        # Kept for the random pass, as an out-of-place op with the same arguments.
        kwargs = {k: v for k, v in node.kwargs.items() if k != "generator"}
        return emit(_random_form(node), *node.args, **kwargs)
    plain = _OPERATOR_NAMES.get(name, name[:-1] if name.endswith("_") else name)
    if out is None:
        functional = getattr(getattr(aten, plain, None), overload_name(node.target), None)  # type: ignore[arg-type]
    else:
        functional = form_without_out(node.target)  # type: ignore[arg-type]
    if functional is None:
        raise CaptureError(
            f"{node.meta.get('source')}: in-place op {name} has no out-of-place form here; write "
            f"the model without it"
        )
    new = emit(functional, *node.args, **{k: v for k, v in node.kwargs.items() if k != "out"})
    if new.meta["val"].dtype != dtype:
        new = emit(aten.to.dtype, new, dtype)
    if list(new.meta["val"].shape) != shape:
        new = emit(aten.expand.default, new, shape)
    return new


def _random_form(node: fx.Node) -> Any:
    name, overload = op_name(node), overload_name(node.target)  # type: ignore[arg-type]
    if name == "bernoulli_":
        return aten.bernoulli.p if overload == "float" else aten.bernoulli.Tensor
    if name == "normal_":
        return aten.normal_functional.default
    return getattr(getattr(aten, name[:-1]), overload)


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def _put_back(emit: Emitter, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    """The parent's value after `value` was written through `view`."""
    if view.target is operator.getitem:
        return _put_back_piece(emit, view, parent, value)
    name = op_name(view)
    if _shape(parent) == _shape(value) and name in _SAME:
        return value
    inverse = _INVERSES.get(name)
    if inverse is None:
        raise CaptureError(
            f"{view.meta.get('source')}: a value is written in place through {name}, which cannot "
            "be captured; write with torch.where, slices or index_put, or clone before writing"
        )
    return inverse(emit, bound_args(view), parent, value)


def _put_back_piece(emit: Emitter, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
    """A piece of chunk, split or unbind."""
    source, index = view.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    dim = int(bound_args(source)["dim"] or 0)
    if op_name(source) == "unbind":
        return emit(aten.select_scatter.default, parent, value, dim, index)
    start = sum(piece.shape[dim] for piece in source.meta["val"][:index])
    end = start + _shape(value)[dim]
    return emit(aten.slice_scatter.default, parent, value, dim, start, end, 1)


_SAME = frozenset(
    {"alias", "detach", "to", "contiguous", "view", "reshape", "expand", "slice", "lift_fresh"}
)


def _inverse_permute(emit: Emitter, bound: dict[str, Any], old: fx.Node, new: fx.Node) -> fx.Node:
    dims = [d % len(bound["dims"]) for d in bound["dims"]]
    return emit(aten.permute.default, new, [dims.index(i) for i in range(len(dims))])


def _slice_scatter(emit: Emitter, b: dict[str, Any], old: fx.Node, new: fx.Node) -> fx.Node:
    return emit(
        aten.slice_scatter.default, old, new, b["dim"] or 0, b["start"], b["end"], b["step"] or 1
    )


def _reshape_back(emit: Emitter, b: dict[str, Any], old: fx.Node, new: fx.Node) -> fx.Node:
    return emit(aten.reshape.default, new, _shape(old))


_INVERSES: dict[str, Callable[[Emitter, dict[str, Any], fx.Node, fx.Node], fx.Node]] = {
    "slice": _slice_scatter,
    "narrow": lambda e, b, old, new: e(
        aten.slice_scatter.default, old, new, b["dim"], b["start"], b["start"] + b["length"], 1
    ),
    "select": lambda e, b, old, new: e(aten.select_scatter.default, old, new, b["dim"], b["index"]),
    "diagonal": lambda e, b, old, new: e(
        aten.diagonal_scatter.default, old, new, b["offset"] or 0, b["dim1"] or 0, b["dim2"] or 1
    ),
    "transpose": lambda e, b, old, new: e(aten.transpose.int, new, b["dim0"], b["dim1"]),
    "t": lambda e, b, old, new: e(aten.t.default, new),
    "numpy_T": lambda e, b, old, new: e(aten.numpy_T.default, new),
    "permute": _inverse_permute,
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"),
        _reshape_back,
    ),
}
