"""Text that every machine with Python holds: the standard library's own source files."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_CORPUS_BYTES = 16 * 2**20
_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@functools.cache
def _corpus() -> Tensor:
    """The source files in path order, one after the other, as a uint8 tensor."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if _SKIP.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= _CORPUS_BYTES:
            break
    if not text:
        raise FileNotFoundError(f"no .py files under {root}: this Python has no library source")
    return torch.frombuffer(text[:_CORPUS_BYTES], dtype=torch.uint8)


def stdlib_bytes(
    global_batch: int, seq_len: int = 128, seed: int = 0, start_sample: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of byte windows at random places in the library's source.

    The same arguments (and the same Python release) give the same batches.

    Args:
        global_batch: Windows of one batch.
        seq_len: Bytes of one window.
        seed: Seed of the places.
        start_sample: Windows to leave out, so that a run that goes on need not read over them.

    Yields:
        `(tokens, targets)`: two int64 tensors of shape (global_batch, seq_len) with values in
        0..255; `targets` is `tokens` one byte later.
    """
    corpus = _corpus()
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq_len + 1)
    for _ in range(start_sample // global_batch):
        torch.randint(len(corpus) - seq_len, (global_batch, 1), generator=generator)
    while True:
        starts = torch.randint(len(corpus) - seq_len, (global_batch, 1), generator=generator)
        windows = corpus[starts + offsets].long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
