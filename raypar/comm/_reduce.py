"""Reducing tensors in rank order, so that the result has the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from raypar.errors import CommError, did_you_mean

OPS = ("sum", "max", "min")

_LOW_PRECISION = frozenset({torch.float16, torch.bfloat16})
_NUMPY: dict[str, Callable[..., Any]] = {"sum": np.add, "max": np.maximum, "min": np.minimum}
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOATS = frozenset({torch.float32, torch.float64})
_COMPLEX = frozenset({torch.complex64, torch.complex128})


def check_reducible(dtype: torch.dtype, op: str, call: str) -> None:
    """Refuses a reduction that has no meaning.

    Raises:
        CommError: Unknown `op`, or one that `dtype` has not.
    """
    if op not in OPS:
        raise CommError(
            f"{call}: unknown op {op!r}; valid: {', '.join(OPS)}.{did_you_mean(op, OPS)}"
        )
    real = _INTEGERS | _FLOATS | _LOW_PRECISION
    known = real | (_COMPLEX if op == "sum" else frozenset({torch.bool}))
    if dtype not in known:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in known))
        raise CommError(f"{call}: {op} of {dtype} is not defined; it is for {names}")


def reduce_in_order(parts: Sequence[torch.Tensor], op: str, out: torch.Tensor) -> None:
    """Writes the reduction of `parts` into `out`, which may be one of them.

    float16 and bfloat16 are added up in float32 and rounded once. The other dtypes go through
    numpy: it uses no thread pool, and this runs on the transport's threads, for each of which
    torch would start an OpenMP team of its own.
    """
    if parts[0].dtype in _LOW_PRECISION:
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            other = part.to(torch.float32)
            if op == "sum":
                total += other
            else:
                total = torch.maximum(total, other) if op == "max" else torch.minimum(total, other)
        out.copy_(total)
        return
    apply = _NUMPY[op]
    arrays = [part.numpy() for part in parts]
    target = out.numpy()
    if len(arrays) == 1:
        np.copyto(target, arrays[0])
        return
    if len(arrays) == 2:
        apply(arrays[0], arrays[1], out=target)
        return
    scratch = apply(arrays[0], arrays[1])
    for array in arrays[2:-1]:
        apply(scratch, array, out=scratch)
    apply(scratch, arrays[-1], out=target)
