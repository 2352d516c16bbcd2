"""The bytes of a message: a small header, the shape, the key, then the tensor's own bytes.

Both ends run the same raypar on machines of equal byte order, so the header is plain little-endian
and the payload is the tensor's memory.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch

DATA, BYE, ABORT = 1, 2, 3

HEADER = struct.Struct("<BBHIQ")
"""Kind, dtype code, dimensions, key bytes, payload bytes."""

_NAMES = (
    "float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool",
    "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _NAMES)
"""Dtype of every wire code; codes are positions, so new ones go to the end."""

_PLAIN = frozenset({torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8})

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class Head(NamedTuple):
    """A parsed header.

    Attributes:
        kind: `DATA`, `BYE` or `ABORT`.
        dtype: Of the tensor (`DATA` only).
        shape: Of the tensor.
        key: Message key, or what a control frame says.
        nbytes: Payload bytes that follow.
    """

    kind: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    key: bytes
    nbytes: int


@functools.lru_cache(maxsize=8192)
def data_header(key: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The header of a tensor's message; cached, since a step repeats the one before it."""
    count = 1
    for dim in shape:
        count *= dim
    head = HEADER.pack(DATA, _CODES[dtype], len(shape), len(key), count * dtype.itemsize)
    return head + struct.pack(f"<{len(shape)}Q", *shape) + key


def control_frame(kind: int, text: bytes) -> bytes:
    """A frame without payload."""
    return HEADER.pack(kind, 0, 0, len(text), 0) + text


def head_size(buffer: bytearray, start: int) -> int:
    """Bytes of the whole header that starts there; its fixed part must be in the buffer."""
    _, _, ndim, nkey, _ = HEADER.unpack_from(buffer, start)
    return int(HEADER.size + 8 * ndim + nkey)


def parse_head(buffer: bytearray, start: int) -> Head:
    """Reads the header that starts there; all of it must be in the buffer."""
    kind, code, ndim, nkey, nbytes = HEADER.unpack_from(buffer, start)
    at = start + HEADER.size
    shape = struct.unpack_from(f"<{ndim}Q", buffer, at)
    at += 8 * ndim
    return Head(kind, DTYPES[code], shape, bytes(memoryview(buffer)[at : at + nkey]), nbytes)


def payload(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor without gradient history, without a copy."""
    if tensor.dtype in _PLAIN and tensor.numel():
        return tensor.numpy().data.cast("B")  # half the time of the general way below
    return tensor.reshape(-1).view(torch.uint8).numpy().data
