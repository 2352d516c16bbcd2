"""One op of the graph as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Op:
    """One op.

    Attributes:
        id: Canonical id: module path, op, occurrence; equal for every batch size.
        name: The operator's name, as ``linear``.
        module: Path of the module that called it.
        source: ``file:line`` of the user's code.
        inputs: Ids of what it reads (ops, ``param:NAME``, ``buffer:NAME``, ``in:I``).
        params: Names of the parameters it reads.
        shapes: Shape of every output tensor (a data-dependent dim is -1).
        dtypes: Dtype of every output tensor, as text.
        arguments: The call's other arguments as text.
        flops: Forward floating-point operations.
        nbytes: Bytes read and written by the forward op.
        out_bytes: Bytes of its output.
    """

    id: str
    name: str
    module: str
    source: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    arguments: str
    flops: int
    nbytes: int
    out_bytes: int
