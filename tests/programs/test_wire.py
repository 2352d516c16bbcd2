"""What is shipped to a rank is data, and only ops of the allow-list run there."""

from __future__ import annotations

import operator
import os
import pickle

import pytest
import torch
from torch import fx, nn

import raypar
from raypar.errors import PlanError
from raypar.graph.replay import replay
from raypar.programs.codegen import compile_piece
from raypar.programs.partition import Piece
from raypar.programs.wire import find_target, pack, target_name, unpack

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        h = torch.dropout(self.layer(x), 0.25, True)
        left, right = h.chunk(2, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = left @ right.t()
        return h[:, 1::2].double().mean()


def _graph():
    return raypar.capture(Model, (torch.zeros(8, 6),)).local(4).graph


def test_a_graph_survives_the_trip():
    graph = _graph()
    wire = pickle.loads(pickle.dumps(pack(graph)))
    again = unpack(wire, CPU)
    assert pack(again) == wire
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.zeros(3, dtype=torch.int64)
        if n.meta["id"] == "rng"
        else torch.randn(n.meta["val"].shape, generator=generator)
        for n in graph.find_nodes(op="placeholder")
    ]
    results = [
        replay(g, dict(zip(g.find_nodes(op="placeholder"), values, strict=True)))
        for g in (graph, again)
    ]
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("target", [os.system, print, operator.methodcaller, eval])
def test_foreign_functions_do_not_ship(target):
    graph = fx.Graph()
    graph.output((graph.call_function(target, ("x",)),))
    next(iter(graph.nodes)).meta["id"] = "op"
    with pytest.raises(PlanError, match="may be shipped"):
        pack(graph)


@pytest.mark.parametrize(
    "name",
    ["os.system", "aten::from_file.default", "c10d::allreduce_.default", "builtins.eval", ""],
)
def test_unknown_targets_are_refused_on_arrival(name):
    with pytest.raises(PlanError, match="not in the list"):
        find_target(name)


def test_an_op_that_this_torch_lacks_is_refused():
    with pytest.raises(PlanError, match="no operator"):
        find_target("aten::no_such_op.default")


def test_names_and_targets_are_inverse():
    for target in (torch.ops.aten.linear.default, torch.ops.aten.add.Tensor, operator.getitem):
        assert find_target(target_name(target)) is target


@pytest.mark.parametrize("bad", [("code", "1"), ("torch", "nn"), ("torch", "load")])
def test_malformed_arguments_are_refused(bad):
    wire = {"nodes": [("call", "op", "aten::add.Tensor", [bad], {}, None)], "output": ()}
    with pytest.raises(PlanError, match="malformed"):
        unpack(wire, CPU)


@pytest.mark.parametrize("name", ["a=1, b", "__import__('os').system('x') or a", "", "a\n", 3])
def test_an_arguments_name_cannot_be_code(name):
    wire = {"nodes": [("call", "op", "aten::add.Tensor", [], {name: 1}, None)], "output": ()}
    with pytest.raises(PlanError, match="no argument's name"):
        unpack(wire, CPU)


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"nodes": [()], "output": ()},
        {"nodes": [("in", "x", (-1,), ("torch", "float32"))], "output": ()},
        {"nodes": [("in", "x", "ab", 3)], "output": ()},
        {"nodes": [("call", "op", "aten::add.Tensor", [("node", 5)], {}, None)], "output": ()},
        {"nodes": [("call", "op", 7, [], {}, None)], "output": ()},
        {"nodes": [], "output": ("node", "x")},
    ],
)
def test_malformed_graphs_are_plan_errors(wire):
    with pytest.raises(PlanError):
        unpack(wire, CPU)


@pytest.mark.parametrize("name", ["_print", "manual_seed", "set_grad_enabled", "save", "set_"])
def test_operators_that_reach_beyond_their_tensors_are_refused(name):
    with pytest.raises(PlanError, match="not in the list"):
        find_target(f"aten::{name}.default")


def test_code_generation_refuses_it_too():
    graph = fx.Graph()
    call = graph.call_function(torch.ops.aten.add.Tensor, (), {"x=print('ran'), y": 1})
    piece = Piece([], [call], [call])
    with pytest.raises(PlanError, match="no argument's name"):
        compile_piece(piece, {}, name="test")
