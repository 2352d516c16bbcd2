"""What of NCCL does not need a GPU: type codes, errors in words, how unique ids travel."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from raypar.errors import CommError

UNIQUE_ID_BYTES = 128

# Values of ncclDataType_t and ncclRedOp_t in nccl.h; they are part of NCCL's binary interface.
_UINT8 = 1
_TYPES: dict[torch.dtype, int] = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.uint32: 3,
    torch.int64: 4,
    torch.uint64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_OPS = {"sum": 0, "max": 2, "min": 3}


def moved_as(tensor: torch.Tensor) -> tuple[int, int]:
    """(count, type code) to move a tensor bit for bit: bytes, which suits every dtype."""
    return tensor.numel() * tensor.element_size(), _UINT8


def reduced_as(dtype: torch.dtype, op: str, call: str) -> tuple[int, int, int]:
    """(elements of NCCL's type per tensor element, type code, op code) to reduce a dtype.

    Complex numbers are added up as pairs of reals; bool has max and min, as bytes.

    Raises:
        CommError: NCCL cannot reduce the dtype so.
    """
    if op not in _OPS:
        valid = ", ".join(map(repr, _OPS))
        raise CommError(f"{call}: unknown op {op!r}; valid: {valid}")
    if dtype.is_complex and op == "sum" and dtype in (torch.complex64, torch.complex128):
        return 2, _TYPES[torch.float32 if dtype == torch.complex64 else torch.float64], _OPS[op]
    if dtype == torch.bool and op != "sum":
        return 1, _UINT8, _OPS[op]
    if dtype not in _TYPES:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in _TYPES))
        raise CommError(f"{call}: NCCL has no {op} of {dtype}; it is for {names}")
    return 1, _TYPES[dtype], _OPS[op]


def numbered(device: torch.device | str | int | None) -> torch.device:
    """A device as tensors name it: ``cuda`` alone is the current one."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    place = torch.device("cuda" if device is None else device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def as_one(rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors of equal form that follow one another in memory, as one; None where they do not."""
    first = rows[0]
    step = first.numel() * first.element_size()
    for i, row in enumerate(rows):
        follows = row.data_ptr() == first.data_ptr() + i * step
        alike = row.shape == first.shape and row.dtype == first.dtype
        if not (follows and alike and row.is_contiguous()) or row.is_conj() or row.is_neg():
            return None
    storage = first.untyped_storage()
    if any(row.untyped_storage().data_ptr() != storage.data_ptr() for row in rows):
        return None  # neighbours by chance
    return first.as_strided((len(rows), *first.shape), (first.numel(), *first.stride()))


def pack_ids(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Unique ids, tuples of 128 C chars, as one tensor that any backend can carry."""
    for one in ids:
        if len(one) != UNIQUE_ID_BYTES:
            raise CommError(f"an NCCL id has {UNIQUE_ID_BYTES} bytes, found {len(one)}")
    return torch.tensor([list(one) for one in ids], dtype=torch.int16)


def unpack_ids(packed: torch.Tensor) -> list[tuple[int, ...]]:
    """The reverse of `pack_ids`."""
    return [tuple(int(value) for value in row) for row in packed.tolist()]


def pip_line(cuda: str | None = None) -> str:
    """The pip line that brings the cupy that fits torch's CUDA version (default: this torch's)."""
    found = cuda if cuda is not None else torch.version.cuda
    major = (found or "").split(".")[0]
    if major not in ("12", "13"):
        return (
            "pip install a torch built for CUDA 12 or 13 (https://pytorch.org/get-started), then "
            "pip install 'raypar[cuda12]' or 'raypar[cuda13]'"
        )
    return f"pip install 'raypar[cuda{major}]'"


def installed_cupys() -> list[str]:
    """Names of the cupy distributions of this environment."""
    names = ("cupy", *(f"cupy-cuda{major}x" for major in (11, 12, 13)))
    return [name for name in names if _installed(name)]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def mismatch(cuda: str | None, installed: Sequence[str]) -> str | None:
    """Why the cupy that is installed does not fit torch's CUDA, with the way out; None if it does.

    Two builds of CUDA in one process each bring their own runtime and NCCL, and crash where the
    first of them hands the other a stream.

    Args:
        cuda: The version of CUDA that torch was built for.
        installed: Names of cupy's distributions.
    """
    major = (cuda or "").split(".")[0]
    right = f"cupy-cuda{major}x"
    wrong = [name for name in installed if name not in (right, "cupy")]
    if not wrong or not major:
        return None
    change = f"pip uninstall {' '.join(wrong)}"
    if right in installed:
        return (
            f"both {right} and {', '.join(wrong)} are installed, and overwrite each other's files: "
            f"{change}, then pip install --force-reinstall {right}"
        )
    return (
        f"torch was built for CUDA {cuda}, and {', '.join(wrong)} is for another: {change}, then "
        f"{pip_line(cuda)}"
    )


def unavailable_reason() -> str | None:
    """Why NCCL cannot be used on this machine, with the way out; None if it can."""
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} was built for " + (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        )
        return f"torch sees no CUDA GPU ({built}); use backend 'gloo' for CPU tensors"
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed; {pip_line()}"
    reason = mismatch(torch.version.cuda, installed_cupys())
    if reason is not None:
        return reason
    try:
        load()
    except CommError as error:
        return str(error)
    return None


def load() -> ModuleType:
    """Imports cupy's NCCL module.

    Raises:
        CommError: cupy is missing, is for another CUDA, or does not find NCCL's library.
    """
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise CommError(f"cupy's NCCL cannot be imported ({error}); {pip_line()}") from None
    if not getattr(nccl, "available", True):
        raise CommError(
            "cupy does not find libnccl.so.2, which CUDA builds of torch bring along; "
            f"{pip_line()}, with the cupy that matches torch's CUDA {torch.version.cuda}"
        )
    return nccl


def explain(error: BaseException, call: str) -> CommError:
    """An NCCL or CUDA error as a CommError with what usually lies behind it."""
    text = f"{type(error).__name__}: {error}"
    hints: list[tuple[str, str]] = [
        (
            "UNHANDLED_CUDA",
            "a CUDA call failed, often out of memory: lower the batch or NCCL_BUFFSIZE",
        ),
        ("SYSTEM_ERROR", "a socket or shared memory failed: see NCCL_SOCKET_IFNAME and /dev/shm"),
        ("INVALID_USAGE", "two ranks share one GPU, or ranks disagree: give each rank its own GPU"),
        ("INVALID_ARGUMENT", "ranks disagree on shapes or ranks"),
        ("INTERNAL", "run again with NCCL_DEBUG=WARN for NCCL's own words"),
    ]
    hint = next((h for word, h in hints if word in str(error)), "NCCL_DEBUG=WARN tells more")
    return CommError(f"{call}: {text} ({hint})")


Communicator = Any
"""A cupy NcclCommunicator; untyped, since cupy is optional."""
