"""Recurrent layers are cut over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raypar.graph.passes.emit import aten
from tests.sharding.one_op import check_op, real


def _weights(gates: int, inside: int, hidden: int, copies: int = 1) -> list[torch.Tensor]:
    rows = gates * hidden
    return [real(rows, inside), real(rows, hidden), real(rows), real(rows, seed=1)] * copies


@pytest.mark.parametrize("first", [True, False], ids=["samples first", "time first"])
def test_layers(first: bool) -> None:
    x = real(4, 3, 5) if first else real(3, 4, 5)
    at = 0 if first else 1
    options = (True, 1, 0.0, True)
    both = [w.clone() for w in _weights(4, 5, 6, copies=2)]
    lstm = check_op(
        aten.lstm.input, x, [real(2, 4, 6), real(2, 4, 6, seed=1)], both, *options, True, first
    )
    assert lstm == [f"S{at} S1 S1{' Rg' * 8} > S{at} S1 S1"]
    gru = check_op(aten.gru.input, x, real(1, 4, 6), _weights(3, 5, 6), *options, False, first)
    assert gru == [f"S{at} S1{' Rg' * 4} > S{at} S1"]


CELLS: dict[str, tuple[Any, Any, int]] = {
    "gru": (aten.gru_cell.default, real(4, 6), 3),
    "lstm": (aten.lstm_cell.default, [real(4, 6), real(4, 6, seed=1)], 4),
    "tanh": (aten.rnn_tanh_cell.default, real(4, 6), 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_one_time_step(name: str) -> None:
    target, hidden, gates = CELLS[name]
    found = check_op(target, real(4, 5), hidden, *_weights(gates, 5, 6))
    assert len(found) == 1
    assert found[0].startswith("S0 S0")
