"""Prices of ops that ranks run as many calls, beside what these calls come to when traced."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import raypar
from raypar.graph.build import CleanGraph
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import Link
from raypar.plan import MeshSlice
from raypar.search.cost.base import StageCode
from raypar.search.cost.exact import piece_cost, stage_pieces
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.intra import rewritten
from raypar.search.intra.prices import OpPrice, Prices
from raypar.search.intra.rewritten import local_calls, price_of
from raypar.search.intra.settings import IntraSettings, read_graph
from raypar.search.intra.ties import twins_of
from raypar.sharding.lower import lower
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.strategies import strategies, whole
from tests.search.test_alpa_odd import captured

ROWS, CLASSES = 4096, 8192
FOUR = MeshSlice((0, 1, 2, 3), (1, 4), ("data", "x"))
ON, SLOW = (
    machine_of(Cluster.virtual(1, 4, "A100-80", inside=link), FOUR)
    for link in (Link(100e9, 5e-6, "fast"), Link(100e9, 1.0, "slow"))
)


class Ends(nn.Module):
    """Something on logits, which a product before makes."""

    def __init__(self, end: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES, bias=False)
        self.end = end

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.end(self.head(x), target)


def entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, reduction="sum")


def softmax(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return F.softmax(logits, -1).square().sum()


@dataclass(frozen=True)
class Case:
    """An op of a graph, and one of its strategies that cuts classes."""

    clean: CleanGraph
    op: fx.Node
    strategy: Strategy
    price: OpPrice

    @property
    def graph(self) -> fx.Graph:
        return self.clean.graph


def case(end: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str) -> Case:
    inputs = torch.empty(ROWS, 16, device="meta"), torch.empty(ROWS, device="meta").long()
    clean = raypar.capture(lambda: Ends(end), inputs, batch_dims=(0, 0)).at(ROWS)
    read = read_graph(clean, None)
    op = next(node for node in read.ops if OpView(node).name == name)
    strategy = next(
        s for s in strategies(op, (4,)) if str(s.inputs[0]) == "S1" and str(s.outputs[0]) != "P"
    )
    return Case(clean, op, strategy, Prices(read, ON, IntraSettings()).op(op, strategy))


def traced_s(found: Case, machine: MeshMachine) -> float:
    """Seconds of both passes of a graph, without those of its product; all of it is cut alike."""
    calls = [n for n in found.graph.nodes if n.op == "call_function"]
    chosen = {n: _by_classes(n) for n in calls} | {found.op: found.strategy}
    local = lower(found.graph, chosen, machine.mesh.inner).graph
    code = StageCode(local, trainable=("head.weight",), outputs_with_grad=(0,), axes=(("x", 4),))
    pieces = stage_pieces(code)
    joint = pieces.joint
    assert joint is not None
    nodes = [n for n in joint.graph.nodes if n.op == "call_function"]
    cost = piece_cost([n for n in nodes if "mm" not in str(n.target)], machine)
    moved = sum(machine.collective_s(m.axis, m.kind, m.nbytes) for m in cost.moves)
    return cost.seconds + moved


def _by_classes(op: fx.Node) -> Strategy:
    """How an op runs where logits are cut by classes."""
    for strategy in strategies(op, (4,)):
        last = strategy.outputs[0] if OpView(op).name == "linear" else strategy.inputs[0]
        if str(last) == "S1":
            return strategy
    return whole(op, 1)


def test_a_vocabulary_parallel_loss_costs_what_its_calls_cost() -> None:
    found = case(entropy, "cross_entropy_loss")
    priced = found.price.forward_s + found.price.backward_s
    assert priced == pytest.approx(traced_s(found, ON), rel=0.3)
    single = 3 * ROWS * CLASSES / 4 * 4 / 2039e9  # the bytes of one op that reads its part
    assert priced > 2 * single


def test_a_softmax_over_a_cut_dim_costs_what_its_calls_cost() -> None:
    found = case(softmax, "softmax")
    prices = Prices(read_graph(found.clean, None), ON, IntraSettings())
    calls = [n for n in found.graph.nodes if n.op == "call_function"]
    after = [prices.op(n, _by_classes(n)) for n in calls[calls.index(found.op) + 1 :]]
    priced = sum(price.forward_s + price.backward_s for price in (found.price, *after))
    assert priced == pytest.approx(traced_s(found, ON), rel=0.3)


def test_an_op_on_smaller_tensors_is_not_written_anew() -> None:
    found = case(entropy, "cross_entropy_loss")
    for strategy in strategies(found.op, (4,)):
        calls = local_calls(found.op, strategy, (("x", 4),), (True, False))
        cuts_classes = str(strategy.inputs[0]) == "S1"
        assert (calls is not None) == cuts_classes
    assert found.price.saved >= ROWS * CLASSES / 4 * 4


def test_calls_are_written_once_for_all_devices_and_policies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = case(softmax, "softmax")
    read = read_graph(found.clean, None)
    prices = {r: Prices(read, ON, IntraSettings(recompute=r)) for r in ("none", "full")}
    strategy = _by_classes(found.op)
    first = {r: p.op(found.op, strategy) for r, p in prices.items()}
    slower = Prices(read, SLOW, IntraSettings()).op(found.op, strategy)
    monkeypatch.setattr("raypar.search.intra.rewritten.local_graph", None)
    again = Prices(read_graph(found.clean, None), ON, IntraSettings()).op(found.op, strategy)
    assert again == first["none"]
    assert first["full"].backward_s > first["none"].backward_s
    assert slower.forward_s > first["none"].forward_s
    with pytest.raises(TypeError):  # another gradient: other calls
        local_calls(found.op, strategy, (("x", 4),), (False,))


def test_calls_are_forgotten_with_their_graph() -> None:
    inputs = torch.empty(ROWS, 16, device="meta"), torch.empty(ROWS, device="meta").long()
    clean = raypar.capture(lambda: Ends(softmax), inputs, batch_dims=(0, 0)).at(ROWS)
    (op,) = [n for n in read_graph(clean, None).ops if OpView(n).name == "softmax"]
    assert local_calls(op, _by_classes(op), (("x", 4),), (True,)) is not None
    graph = weakref.ref(op.graph)
    assert graph() in rewritten._known
    del clean, op
    gc.collect()
    assert graph() is None


def test_twins_cost_the_same() -> None:
    graph = captured("gpt", 4)
    read = read_graph(graph.at(4).graph, None)
    twins = twins_of(read)
    assert len(set(twins.values())) < len(twins) / 2
    prices = Prices(read, ON, IntraSettings(microbatches=2))
    for op, twin in twins.items():
        for strategy in strategies(op, (4,)):
            assert prices.op(op, strategy) == prices.op(twin, strategy), op


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_calls_are_paid_twice_and_hold_nothing(recompute: str) -> None:
    found = case(entropy, "cross_entropy_loss")
    read = read_graph(found.clean, None)
    again = Prices(read, ON, IntraSettings(recompute=recompute)).op(found.op, found.strategy)
    assert again.forward_s == found.price.forward_s
    more = again.backward_s - found.price.backward_s
    calls = local_calls(found.op, found.strategy, (("x", 4),), (True, False))
    assert calls is not None
    silent = price_of(calls, ON, "none", lambda *_: 0.0)[0]  # collectives are kept
    assert more == pytest.approx(again.forward_s if recompute == "full" else silent)
    assert again.saved == 0.0


def prices_of(model: nn.Module, *inputs: torch.Tensor, op: str, how: str) -> list[OpPrice]:
    """The prices of all ops of a name in one strategy, over slow links."""
    clean = raypar.capture(lambda: model, inputs, batch_dims=(0,) * len(inputs)).at(len(inputs[0]))
    read = read_graph(clean, None)
    nodes = [node for node in read.ops if OpView(node).name == op]
    prices = Prices(read, SLOW, IntraSettings())
    return [prices.op(n, s) for n in nodes for s in strategies(n, (4,)) if str(s) == how]


def test_gradients_of_gathered_values_fill_zeros_of_their_size() -> None:
    class Picks(Ends):
        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.head(x).gather(1, target[:, None]).sum()

    inputs = torch.empty(ROWS, 16, device="meta"), torch.empty(ROWS, device="meta").long()
    (found,) = prices_of(Picks(softmax), *inputs, op="gather", how="S1 R > P")
    assert found.backward_s > ROWS * CLASSES / 4 * 4 / 2039e9


def test_rows_of_neighbours_travel_there_and_back() -> None:
    class Convolves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).square().sum()

    images = torch.empty(4, 8, 64, 64, device="meta")
    first, second = prices_of(Convolves(), images, op="conv2d", how="S2 Rg Rg > S2")
    latency = SLOW.collective_s("x", "all_gather", 0)
    assert first.forward_s > latency
    assert first.backward_s < latency  # nobody wants the gradient of the images
    assert first.saved == 0.0  # the reader holds the result
    assert second.forward_s > latency
    assert second.backward_s > latency


def test_what_makes_tensors_is_not_run_to_be_priced() -> None:
    class Fills(Ends):
        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (self.head(x) * torch.full((1, CLASSES), 2.0)).sum()

    inputs = torch.empty(ROWS, 16, device="meta"), torch.empty(ROWS, device="meta").long()
    clean = raypar.capture(lambda: Fills(softmax), inputs, batch_dims=(0, 0)).at(ROWS)
    fills = [n for n in read_graph(clean, None).ops if OpView(n).name.startswith("full")]
    assert fills
    for strategy in strategies(fills[0], (4,)):
        assert local_calls(fills[0], strategy, (("x", 4),), ()) is None
