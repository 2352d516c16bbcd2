"""Joint graphs that are put together are the traced ones, node by node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from raypar.compat import storage_id
from raypar.graph.capture import capture
from raypar.lowered import lower_plan
from raypar.mesh.cluster import Cluster
from raypar.programs.joint import Joint, trace_joint
from raypar.programs.recurrent import fuse_recurrent
from raypar.programs.stitch import stitch_joint, worth_stitching
from raypar.programs.wire import Wire, pack, unpack
from raypar.search.cost.base import StageCode, stage_code
from raypar.testing import models
from raypar.testing.plans import random_plan
from raypar.testing.sharding import random_sharding

CPU = torch.device("cpu")


def _form(joint: Joint) -> list[Any]:
    """All that a joint graph says, names apart: calls, values, and what shares a storage."""
    place = {node: i for i, node in enumerate(joint.graph.nodes)}
    storages: dict[int, int] = {}

    def value(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return [value(one) for one in item]
        if not isinstance(item, torch.Tensor):
            return item
        own = storages.setdefault(storage_id(item), len(storages))
        size = item.untyped_storage().nbytes()
        return (*item.shape, item.stride(), item.storage_offset(), item.dtype, size, own)

    def nodes(group: Any) -> str:
        return repr(fx.map_arg(group, lambda n: ("node", place[n])))

    found: list[Any] = [
        (node.op, node.target, nodes(node.args), nodes(node.kwargs), value(node.meta["val"]))
        for node in joint.graph.nodes
        if node.op == "call_function"
    ]
    ends = (joint.inputs, joint.tangents, joint.outputs, joint.gradients)
    return [*found, [nodes(list(end)) for end in ends], joint.differentiated, joint.wrt]


def _wanted(code: StageCode, wire: Wire) -> list[int]:
    keys = [node[1] for node in wire["nodes"] if node[0] == "in"]
    edges = [i for i, k in enumerate(keys) if k.removeprefix("edge:") in code.differentiable]
    params = [i for i, k in enumerate(keys) if k.removeprefix("param:") in code.trainable]
    return [*edges, *params]


def _both(code: StageCode) -> tuple[Joint | None, Joint]:
    wire = pack(code.graph)
    wrt = _wanted(code, wire)
    graph = unpack(wire, CPU)
    fuse_recurrent(graph, CPU)
    made = stitch_joint(wire, wrt, code.outputs_with_grad, CPU)
    return made, trace_joint(graph, wrt, code.outputs_with_grad)


@pytest.mark.parametrize("name", ["gpt", pytest.param("cnn", marks=pytest.mark.thorough)])
def test_a_stitched_stage_is_the_traced_one(name: str) -> None:
    case = models.case(name)
    graph = capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    cluster, small = Cluster.virtual(2, 8, "A100-80"), Cluster.virtual(1, 2, "A100-80")
    plan = random_plan(graph, small, seed=1, stages=2, replicas=1, microbatches=2)
    plan = replace(plan, cluster=cluster.shape)
    plan = random_sharding(graph, plan, cluster, seed=1, meshes=[(2,)])
    lowered = lower_plan(graph, plan)
    for index in range(len(plan.stages)):
        made, traced = _both(stage_code(lowered, plan, index))
        assert made is not None
        assert _form(made) == _form(traced)


def test_what_templates_cannot_say_is_left_to_the_trace() -> None:
    case = models.case("lstm")
    graph = capture(case.model_fn, case.batch(0, 4), case.loss_fn, case.batch_dims)
    plan = random_plan(graph, Cluster.local(1), seed=0, stages=1)
    made, traced = _both(stage_code(lower_plan(graph, plan), plan, 0))
    assert made is None
    assert len(traced.graph.nodes)


def test_one_value_that_many_read_sums_its_gradients_in_the_order_of_autograd() -> None:
    def step(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        y = torch.nn.functional.layer_norm(x @ w, (4,))
        return ((y * y + y.exp() * x + (y.t() @ y).sum()).tanh() @ w,)

    wire: Wire = _shipped(step)
    joint = stitch_joint(wire, [0, 1], [0], CPU)
    traced = trace_joint(unpack(wire, CPU), [0, 1], [0])
    assert joint is not None
    assert _form(joint) == _form(traced)


def test_stitching_waits_until_calls_repeat() -> None:
    def once(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x @ w).softmax(1).roll(12345, 0),)

    wire = _shipped(once)
    assert not worth_stitching(wire)
    assert worth_stitching(wire)


def _shipped(step: Any) -> Wire:
    """A function of two 4 × 4 tensors as a stage that ships."""
    from raypar.compat import FakeTensorMode, make_fx

    calls = make_fx(step, pre_dispatch=True)(torch.zeros(4, 4), torch.zeros(4, 4)).graph
    mode = FakeTensorMode()
    for i, holder in enumerate(calls.find_nodes(op="placeholder")):
        with mode:
            holder.meta.update(val=torch.empty(4, 4), id=f"param:{i}")
    for node in calls.nodes:
        node.meta.setdefault("id", node.name)
    return pack(calls)
