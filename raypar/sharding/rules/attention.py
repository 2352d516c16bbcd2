"""Attention as one op."""

from __future__ import annotations

from collections.abc import Iterator

from raypar.sharding.rules.base import Choice, OpView, rule
from raypar.sharding.rules.labels import cut_choices


@rule("scaled_dot_product_attention")
def attention(op: OpView, size: int) -> Iterator[Choice]:
    """Batch; heads; queries, where no position is implied.

    Features of the values could be cut too, but each coordinate would do all of query times key.

    With grouped queries a part of the query heads meets just its own part of the key heads, since
    query head i reads key head ``i // group``. One key head is read whole by all.
    """
    bound = op.bound
    if bound["dropout_p"]:
        return
    rank = len(op.out)
    batch: list[object] = list(range(rank - 2))
    query = [*_present(batch, op.shapes[0], op.out), None if bound["is_causal"] else "query", None]
    keys = [*_heads(op, batch, 1), None, None]
    values = [*_heads(op, batch, 2), None, None]
    inputs = [query, keys, values]
    if len(op.tensors) == 4:
        shape = op.shapes[3]
        full = [*batch, "query", None]
        sizes = [*op.out[:-1], op.shapes[1][-2]]
        shift = rank - len(shape)
        inputs.append([full[d + shift] if n == sizes[d + shift] else None
                       for d, n in enumerate(shape)])  # fmt: skip
    yield from cut_choices(op, inputs, [[*batch, query[-2], None]])


def _heads(op: OpView, batch: list[object], index: int) -> list[object]:
    """Labels of the batch dims of keys or values; grouped heads have the label of the heads."""
    shape = op.shapes[index]
    labels = _present(batch, shape, op.out)
    if op.bound.get("enable_gqa") and len(shape) > 2 and shape[-3] > 1:
        labels[-1] = batch[-1]
    return labels


def _present(batch: list[object], shape: tuple[int, ...], out: tuple[int, ...]) -> list[object]:
    """Labels of the batch dims of a tensor, None where it is broadcast."""
    shift = len(out) - len(shape)
    return [batch[d + shift] if n == out[d + shift] else None for d, n in enumerate(shape[:-2])]
