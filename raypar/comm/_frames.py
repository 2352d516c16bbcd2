"""The bytes of a message: a small header, the shape, the key, then the tensor's own bytes.

Both ends run the same raypar on machines of equal byte order, so the header is plain little-endian
and the payload is the tensor's memory. Every number of a header is checked before it is used for
anything: for the length of a read, or for the size of a tensor.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from typing import NamedTuple

import torch

from raypar.comm._endpoint import MAX_KEY_BYTES, is_path
from raypar.errors import CommError

DATA, BYE, ABORT = 1, 2, 3

HEADER = struct.Struct("<BBHIQ")
"""Kind, dtype code, dimensions, key bytes, payload bytes."""

_MOST_DIMS = 64
_MOST_CONTROL_BYTES = 14 << 10  # less than a receiver's scratch buffer
_MOST_REASON = 1500  # characters; JSON writes each with at most 6 bytes
_MOST_ELEMENTS = 1 << 48
_MOST_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
"""A message cannot be larger than the memory of this machine."""

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


def bye_frame() -> bytes:
    """The frame that says goodbye."""
    return HEADER.pack(BYE, 0, 0, 0, 0)


def abort_frame(path: bytes, reason: str) -> bytes:
    """The frame that aborts the group at `path`; a very long reason loses its middle."""
    if len(reason) > _MOST_REASON:
        reason = f"{reason[: _MOST_REASON // 2]} […] {reason[-_MOST_REASON // 2 :]}"
    text = json.dumps([path.decode(), reason], ensure_ascii=False).encode(errors="replace")
    return HEADER.pack(ABORT, 0, 0, len(text), 0) + text


def read_abort(text: bytes) -> tuple[bytes, str]:
    """(path, reason) of an `abort_frame`.

    Raises:
        CommError: It is none.
    """
    try:
        path, reason = json.loads(text)
        if not isinstance(reason, str) or not is_path(path.encode()):
            raise ValueError(f"path {path!r}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CommError(f"an abort that cannot be read ({error})") from None
    return path.encode(), reason


def head_size(buffer: bytearray, start: int) -> int:
    """Bytes of the whole header that starts there; its fixed part must be in the buffer.

    Raises:
        CommError: No header says that.
    """
    kind, _, ndim, nkey, _ = HEADER.unpack_from(buffer, start)
    most_key = MAX_KEY_BYTES if kind == DATA else _MOST_CONTROL_BYTES
    if not DATA <= kind <= ABORT or ndim > _MOST_DIMS or nkey > most_key:
        raise CommError(
            f"a header of kind {kind} with {ndim} dimensions and {nkey} key bytes; kinds are "
            f"{DATA} to {ABORT}, with at most {_MOST_DIMS} dimensions and {most_key} key bytes"
        )
    return int(HEADER.size + 8 * ndim + nkey)


def parse_head(buffer: bytearray, start: int) -> Head:
    """Reads the header that starts there; all of it (`head_size`) must be in the buffer.

    Raises:
        CommError: Its parts contradict each other.
    """
    return _parsed(bytes(memoryview(buffer)[start : start + head_size(buffer, start)]))


@functools.lru_cache(maxsize=8192)
def _parsed(head: bytes) -> Head:
    """Cached, since a step repeats the one before it."""
    kind, code, ndim, _, nbytes = HEADER.unpack_from(head)
    shape = struct.unpack_from(f"<{ndim}Q", head, HEADER.size)
    if kind != DATA and (code or ndim or nbytes):
        raise CommError(f"a control frame of kind {kind} with a payload of {nbytes} bytes")
    if code >= len(DTYPES):
        raise CommError(f"dtype code {code}; known are 0 to {len(DTYPES) - 1}")
    count = 1
    for dim in shape:
        if dim > _MOST_ELEMENTS:
            raise CommError(f"a tensor of shape {shape}")
        count *= dim
    if kind == DATA and (nbytes != count * DTYPES[code].itemsize or nbytes > _MOST_BYTES):
        raise CommError(
            f"{nbytes} bytes for a tensor of shape {shape} {DTYPES[code]}, which has "
            f"{count * DTYPES[code].itemsize}; this machine has {_MOST_BYTES} in all"
        )
    return Head(kind, DTYPES[code], shape, head[HEADER.size + 8 * ndim :], nbytes)


def payload(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor without gradient history, without a copy."""
    if tensor.dtype in _PLAIN and tensor.numel():
        return tensor.numpy().data.cast("B")  # half the time of the general way below
    return tensor.reshape(-1).view(torch.uint8).numpy().data
