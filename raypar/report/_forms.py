"""What people call the ways in which ops are sharded: column-parallel, over heads, and so on.

A strategy says for every tensor which dim is cut. The name of that depends on what the op does with
the dim, so names are worked out from the op, which of its inputs are parameters, and where its
samples lie. Names follow Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022 for sequence
parallelism) and GShard (Lepikhin et al. 2020 for experts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from raypar.graph.states import Batch, States
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import RG, P, R, State, cut_of, is_shard, shard_dim

WHOLE = "whole on every rank"
"""The form of an op that every rank of the axis computes alike."""

_BATCH, _SEQUENCE, _PARTIAL = "batch", "sequence", "partial sums"
_PRODUCTS = frozenset({"linear", "mm", "bmm", "matmul", "mv", "einsum", "addmm", "baddbmm"})
_LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"})
_TABLES = frozenset({"embedding", "embedding_bag"})


class Seen:
    """One op over one mesh axis, as the functions here look at it.

    Attributes:
        op: The op.
        inputs: State of every tensor argument over the axis.
        outputs: State of every tensor result.
        batches: The dim of each argument, and then of the first result, that holds samples, or
            None.
    """

    def __init__(
        self, op: OpView, strategy: Strategy, axis: int, states: Mapping[str, States]
    ) -> None:
        self.op = op
        self.inputs: list[State] = [spec[axis] for spec in strategy.inputs]
        self.outputs: list[State] = [spec[axis] for spec in strategy.outputs]
        self.batches = [_batch_dim(n, states) for n in (*op.tensors, op.node)]

    @property
    def parameter(self) -> int | None:
        """Position of the first argument that is a parameter with two dims or more."""
        for i, (source, shape) in enumerate(zip(self.op.tensors, self.op.shapes, strict=True)):
            if _is_parameter(source) and len(shape) > 1:
                return i
        return None

    @property
    def out(self) -> State:
        """State of the first result."""
        return self.outputs[0] if self.outputs else R

    def out_role(self) -> str | None:
        """What the dim is that the first result is cut along."""
        return self._role(self.out, self.op.out, self.batches[-1]) if self.outputs else None

    def in_role(self) -> str | None:
        """The same for the first argument that is cut."""
        for state, shape, batch in zip(self.inputs, self.op.shapes, self.batches, strict=False):
            if is_shard(state):
                return self._role(state, shape, batch)
        return None

    def _role(self, state: State, shape: Sequence[int], batch: int | None) -> str | None:
        if not is_shard(state):
            return None
        dim = shard_dim(state)
        if dim == batch:
            return _BATCH
        if len(shape) == 3 and dim == 1 and batch == 0:
            return _SEQUENCE
        return "features" if dim == len(shape) - 1 else f"dim {dim}"


def form_of(
    node: fx.Node, strategy: Strategy, axis: int, states: Mapping[str, States] | None = None
) -> str:
    """The name of what an op does over one mesh axis.

    Args:
        node: The op, at the size of one microbatch on one replica.
        strategy: How it runs.
        axis: Index of the mesh axis.
        states: Op or placeholder id → how the value lies in the batch
            (`raypar.graph.batch.BatchAnalysis.states`); without them no dim is known to be the
            batch.
    """
    seen = Seen(OpView(node), strategy, axis, states or {})
    if {*seen.inputs, *seen.outputs} <= {R, RG}:
        return WHOLE
    for applies, name in _NAMED:
        found = name(seen) if applies(seen.op.name) else None
        if found is not None:
            return found
    return seen.out_role() or seen.in_role() or _PARTIAL


def _product(seen: Seen) -> str | None:
    """Products with a parameter: which dim of the parameter is cut."""
    at = seen.parameter
    if at is None or not is_shard(seen.inputs[at]):
        return None
    if seen.out == P:
        return "row-parallel"
    # Whoever has a weight of its own for each of them, and whose inputs are cut alike: an expert.
    own = len(seen.op.shapes[at]) > 2 and shard_dim(seen.inputs[at]) == 0
    return "experts" if own and sum(map(is_shard, seen.inputs)) > 1 else "column-parallel"


def _convolution(seen: Seen) -> str | None:
    x, out = seen.inputs[0], seen.out
    if out == P:
        return "input channels"
    if is_shard(out) and shard_dim(out) == 1:
        return "channel groups" if is_shard(x) and cut_of(x)[0] == 1 else "output channels"
    return "image tiles (spatial)" if is_shard(out) and shard_dim(out) > 1 else None


def _attention(seen: Seen) -> str | None:
    if not is_shard(seen.out):
        return None
    from_right = len(seen.op.out) - shard_dim(seen.out)
    return {3: "heads", 2: "queries"}.get(from_right)


def _table(seen: Seen) -> str | None:
    table = seen.inputs[0]
    if not is_shard(table):
        return None
    return "table columns" if shard_dim(table) == 1 else "vocabulary-parallel (table rows)"


def _loss(seen: Seen) -> str | None:
    logits = seen.inputs[0]
    classes = min(1, len(seen.op.shapes[0]) - 1)
    cut = is_shard(logits) and shard_dim(logits) == classes
    return "vocabulary-parallel" if cut else _BATCH if is_shard(logits) else None


def _batch_norm(seen: Seen) -> str | None:
    x = seen.inputs[0]
    if not is_shard(x):
        return None
    if shard_dim(x) == 1:
        return "channels"
    where = _BATCH if shard_dim(x) == 0 else "image tiles (spatial)"
    return f"{where}, statistics put together"


_NAMED: tuple[tuple[Callable[[str], bool], Callable[[Seen], str | None]], ...] = (
    (_PRODUCTS.__contains__, _product),
    (lambda name: name.startswith("conv"), _convolution),
    (lambda name: name == "scaled_dot_product_attention", _attention),
    (_TABLES.__contains__, _table),
    (_LOSSES.__contains__, _loss),
    (lambda name: "batch_norm" in name, _batch_norm),
)


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.meta.get("id", "")).startswith("param:")


def _batch_dim(node: fx.Node, states: Mapping[str, States]) -> int | None:
    key = str(node.meta.get("id", "")).removeprefix("edge:")
    state = states.get(key)
    if isinstance(state, tuple):
        state = state[0] if state else None
    return state.dim if isinstance(state, Batch) else None
