"""Results that are remembered are what a fake call gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from raypar.compat import fake_mode, storage_id
from raypar.graph import fake_calls
from raypar.graph.fake_calls import RememberingEmitter
from raypar.graph.passes.emit import Emitter, aten


def _calls(kind: type[Emitter]) -> list[fx.Node]:
    graph = fx.Graph()
    mode = fake_mode()
    x, i = graph.placeholder("x"), graph.placeholder("i")
    with mode:
        x.meta["val"] = torch.empty(4, 6)
        i.meta["val"] = torch.empty(4, dtype=torch.int64)
    emit = kind(graph, graph.output(()))
    found = []
    for shift in (1, 1.0, True):  # equal keys of a dict, unequal results
        found += [emit(aten.add.Tensor, i, shift), emit(aten.add.Tensor, i, shift)]
    view = emit(aten.transpose.int, x, 0, 1)
    found += [view, emit(aten.slice.Tensor, view, 0, 2, 5), emit(aten.slice.Tensor, view, 0, 2, 5)]
    found += [emit(aten.clone.default, view), emit(aten.cat.default, [x, x], 1)]
    found += [emit(aten.split.Tensor, x, 2), emit(aten.mul.Tensor, x, x)]
    found += [emit(aten.reshape.default, x, [-1]), emit(aten.reshape.default, view, [-1])]
    found += [emit(aten.new_full.default, x, [2, 3], 0.5)]
    there = torch.device("cpu")
    found += [emit(aten.new_full.default, x, [2, 3], 0.5, device=there, dtype=torch.float16)]
    found += [emit(aten.cat.default, [view, view], 0), emit(aten.slice.Tensor, x, 1, 2, 9, 2)]
    found += [emit(aten.constant_pad_nd.default, view, [1, 0])]
    return found


def _told(nodes: list[fx.Node]) -> list[Any]:
    places: dict[int, int] = {}
    found = []
    for node in nodes:
        value = node.meta["val"]
        for item in value if isinstance(value, (list, tuple)) else [value]:
            own = places.setdefault(storage_id(item), len(places))
            found.append(
                (*item.shape, item.stride(), item.storage_offset(), item.dtype, item.device, own)
            )
    return found


def test_results_lie_as_those_of_a_real_fake_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_calls, "_known", {})
    ran: list[Any] = []
    real = fake_calls._on_meta

    def counted(target: Any, *rest: Any) -> Any:
        ran.append(target)
        return real(target, *rest)

    monkeypatch.setattr(fake_calls, "_on_meta", counted)
    wanted = _told(_calls(Emitter))
    assert _told(_calls(RememberingEmitter)) == wanted
    assert {aten.slice.Tensor, aten.cat.default, aten.reshape.default} <= set(ran)
    ran.clear()
    assert _told(_calls(RememberingEmitter)) == wanted
    assert not ran  # the second time all is remembered


def test_a_region_of_autocast_is_part_of_what_is_remembered() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with fake_mode():
        x.meta["val"] = torch.empty(5, 5, dtype=torch.float32)
    emit = RememberingEmitter(graph, graph.output(()))
    for region, dtype in ((None, torch.float32), (("cpu", torch.bfloat16, True), torch.bfloat16)):
        emit.anchor.meta = {} if region is None else {"autocast": region}
        assert emit(aten.mm.default, x, x).meta["val"].dtype is dtype
