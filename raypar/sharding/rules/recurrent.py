"""Recurrent layers: over samples."""

from __future__ import annotations

from collections.abc import Iterator

from raypar.sharding.rules.base import Choice, OpView, rule
from raypar.sharding.spec import RG, S


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(op: OpView, size: int) -> Iterator[Choice]:
    """Samples; every rank has all weights, and a part of their gradient."""
    if "batch_sizes" in op.bound:
        return  # packed sequences
    dim = 0 if op.bound["batch_first"] else 1
    hidden = len(op.results) - 1
    learned = len(op.tensors) - 1 - hidden
    outputs = (S(dim), *(S(1),) * hidden)
    yield Choice((S(dim), *(S(1),) * hidden, *(RG,) * learned), outputs)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(op: OpView, size: int) -> Iterator[Choice]:
    """One time step: samples."""
    samples = 1 + len(op.results)
    yield Choice(
        (*(S(0),) * samples, *(RG,) * (len(op.tensors) - samples)), (S(0),) * len(op.results)
    )
