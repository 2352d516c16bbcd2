"""One rank's tensors as a safetensors file, laid out in host memory.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes with the length of a JSON header,
the header, then the tensors' bytes without holes; little-endian, row-major.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raypar.errors import CheckpointError
from raypar.stages.saved import Held
from raypar.train.checkpoint.format import BLOCK, DTYPES

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}  # fmt: skip
DTYPES_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
"""The format's names of dtypes."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the file: the position of its first byte, counted from the data's."""

    held: Held
    offset: int

    @property
    def bytes(self) -> int:
        """How long it is."""
        return self.held.tensor.numel() * self.held.tensor.dtype.itemsize


@dataclass(frozen=True)
class Image:
    """A file in the making.

    Attributes:
        header: Its first bytes, up to the data.
        places: Its tensors, in order.
        size: Bytes of the data.
    """

    header: bytes
    places: tuple[Place, ...]
    size: int

    @classmethod
    def of(cls, held: Sequence[Held]) -> Image:
        """Lays tensors out: those with wide elements first, so that each is aligned.

        Raises:
            CheckpointError: A tensor has a dtype that cannot be saved.
        """
        forms = {str(h.key): (tuple(h.tensor.shape), h.tensor.dtype) for h in held}
        header, offsets, size = lay_out(forms)
        places = (Place(h, offsets[str(h.key)]) for h in held)
        return cls(header, tuple(sorted(places, key=lambda p: p.offset)), size)

    def copy(self, room: torch.Tensor) -> None:
        """Copies the tensors into host memory, and waits until they are there.

        Args:
            room: Bytes, at least `size` of them.
        """
        devices = set()
        for place in self.places:
            tensor = place.held.tensor
            if not place.bytes:
                continue
            there = room[place.offset : place.offset + place.bytes]
            there.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def blocks(self, room: torch.Tensor, sums: list[int]) -> Iterator[memoryview]:
        """The file's blocks of `BLOCK` bytes, in order; their checksums are added to `sums`."""
        data = memory_of(room)[: self.size]
        head = len(self.header)
        for start in range(0, head + self.size, BLOCK):
            end = start + BLOCK
            if start >= head:
                block = data[start - head : end - head]
            else:
                rest = data[: max(end - head, 0)]
                block = memoryview(self.header[start:end] + bytes(rest))
            sums.append(zlib.crc32(block))
            yield block


Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def lay_out(forms: Forms) -> tuple[bytes, dict[str, int], int]:
    """The header of a file, where each tensor begins (counted from its end), and bytes of all.

    Tensors with wide elements come first, so that each is aligned.

    Args:
        forms: Shape and dtype of every tensor, by name.

    Raises:
        CheckpointError: A tensor has a dtype that cannot be saved.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name, (shape, dtype) in sorted(forms.items(), key=lambda f: (-f[1][1].itemsize, f[0])):
        if dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name} is a tensor of {dtype}, which a checkpoint cannot hold; it holds "
                + ", ".join(sorted(DTYPES))
            )
        size = math.prod(shape) * dtype.itemsize
        told, dims = _NAMES.get(dtype, "F64"), list(shape)
        if dtype == torch.complex128:  # which the format does not have: pairs of numbers
            dims.append(2)
        table[name] = {"dtype": told, "shape": dims, "data_offsets": [at, at + size]}
        offsets[name] = at
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets, at


def header_of(read: Callable[[int, int], torch.Tensor], size: int) -> tuple[dict[str, int], int]:
    """Where a file's header says that its tensors are.

    Args:
        read: Reads so many bytes (second) from a position on (first).
        size: Bytes of the file.

    Returns:
        By name the first byte, counted from the end of the header; and that end.

    Raises:
        CheckpointError: It is no such file.
    """
    try:
        length = int.from_bytes(_bytes(read(0, 8)), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        text = b"".join(
            _bytes(read(at, min(BLOCK, 8 + length - at))) for at in range(8, 8 + length, BLOCK)
        )
        table = json.loads(text)
        table.pop("__metadata__", None)
        return {name: form["data_offsets"][0] for name, form in table.items()}, 8 + length
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"no safetensors file: {type(error).__name__}: {error}") from None


def write_tensors(path: Path, forms: Forms, tensor_of: Callable[[str, torch.Tensor], None]) -> None:
    """Writes a file, one tensor at a time; it is there as a whole or not at all.

    Args:
        path: The file; one that is there already is replaced.
        forms: Shape and dtype of every tensor.
        tensor_of: Fills memory with the tensor of a name.

    Raises:
        CheckpointError: A tensor has a dtype that cannot be saved, or the file cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{str(path)!r} is no file; give another name")
    header, offsets, _ = lay_out(forms)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "wb") as file:
            file.write(header)
            for name in sorted(offsets, key=lambda n: offsets[n]):
                shape, dtype = forms[name]
                tensor = torch.empty(shape, dtype=dtype)
                tensor_of(name, tensor)
                if tensor.numel():
                    file.write(memory_of(tensor.reshape(-1).view(torch.uint8)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from None
    finally:
        with contextlib.suppress(OSError):  # a folder that is none was told above
            part.unlink(missing_ok=True)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the host."""
    return tensor.numpy().data


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(memory_of(tensor))
