"""Where a run stands in its data, as a value that goes into a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch

from raypar.errors import DataError

_DEEPEST = 64
_MARK = "__raypar__"  # the key that tells an encoded value from a mapping of the loader's own


@dataclass(frozen=True)
class DataPosition:
    """Between two batches: everything before was consumed, nothing after.

    It is a property of the data alone: no plan, replica or stage is in it.

    Attributes:
        samples: Samples consumed since the first step of the run.
        epoch: Full passes over the source, so far.
        index: Samples consumed of the present pass.
        source: What the source itself has to tell (`encoded`), or None: the ``state_dict`` of a
            loader that has one; what samples were drawn from, where raypar draws them.
        random: Random states at the beginning of the present pass (`RandomState.to_json`), for
            sources that draw from the global ones, or None.
    """

    samples: int = 0
    epoch: int = 0
    index: int = 0
    source: Any = None
    random: Any = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Reads what `to_json` gave; an empty mapping is the beginning.

        Raises:
            DataError: It is something else.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or not set(value) <= known:
            raise DataError(
                f"no position in the data: expected {sorted(known)}, found {value!r:.200}"
            )
        for name in ("samples", "epoch", "index"):
            number = value.get(name, 0)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise DataError(
                    f"a position in the data: {name} is {number!r:.100}, expected a whole number "
                    "of at least 0"
                )
        return cls(**value)


class NotPlainError(DataError):
    """A loader's state holds a value that has no plain form."""


def encoded(value: Any, depth: int = 0) -> Any:
    """A loader's state as JSON values: tensors, arrays, bytes, tuples and keys of any kind too.

    Raises:
        NotPlainError: Something else is in it. Nothing is pickled: what is read back runs no code.
    """
    if depth > _DEEPEST:
        raise NotPlainError(f"a loader's state is nested more than {_DEEPEST} deep")
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(value.dtype).removeprefix("torch.")
        return {_MARK: "tensor", "dtype": dtype, "shape": list(value.shape), "hex": _hex(flat)}
    if isinstance(value, np.generic):
        return encoded(value.item(), depth)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        array = np.ascontiguousarray(value)
        shape = list(value.shape)
        return {
            _MARK: "array",
            "dtype": array.dtype.str,
            "shape": shape,
            "hex": array.tobytes().hex(),
        }
    if isinstance(value, (bytes, bytearray)):
        return {_MARK: "bytes", "hex": bytes(value).hex()}
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value) and _MARK not in value:
            return {k: encoded(v, depth + 1) for k, v in value.items()}
        pairs = [[encoded(k, depth + 1), encoded(v, depth + 1)] for k, v in value.items()]
        return {_MARK: "dict", "items": pairs}
    if isinstance(value, list):
        return [encoded(v, depth + 1) for v in value]
    if type(value) is tuple:
        return {_MARK: "tuple", "items": [encoded(v, depth + 1) for v in value]}
    raise NotPlainError(f"a loader's state holds a {type(value).__name__}, which has no plain form")


def decoded(value: Any) -> Any:
    """What `encoded` was given.

    Raises:
        DataError: It is not what `encoded` gives.
    """
    try:
        return _decoded(value, 0)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(
            f"a saved loader state cannot be read: {type(error).__name__}: {error}"
        ) from None


def _decoded(value: Any, depth: int) -> Any:
    if depth > 3 * _DEEPEST:
        raise ValueError("nested too deep")
    if isinstance(value, list):
        return [_decoded(v, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {k: _decoded(v, depth + 1) for k, v in value.items()}
    if kind == "bytes":
        return bytes.fromhex(value["hex"])
    if kind == "tuple":
        return tuple(_decoded(v, depth + 1) for v in value["items"])
    if kind == "dict":
        return {_decoded(k, depth + 1): _decoded(v, depth + 1) for k, v in value["items"]}
    data, shape = bytearray.fromhex(value["hex"]), [int(n) for n in value["shape"]]
    if kind == "array":
        dtype = np.dtype(str(value["dtype"]))
        if dtype.kind not in "biuf":
            raise ValueError(f"no array of dtype {dtype}")
        return np.frombuffer(data, dtype).reshape(shape)
    if kind == "tensor":
        torch_dtype = getattr(torch, str(value["dtype"]))
        if not isinstance(torch_dtype, torch.dtype):
            raise ValueError(f"no tensor dtype {torch_dtype!r:.50}")
        if not data:
            return torch.empty(shape, dtype=torch_dtype)
        return torch.frombuffer(data, dtype=torch_dtype).reshape(shape)
    raise ValueError(f"no such kind of value: {kind!r:.50}")


def _hex(flat: torch.Tensor) -> str:
    return flat.numpy().tobytes().hex()
