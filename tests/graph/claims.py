"""Runs a graph on the whole batch and on its parts, and compares what the analysis claims."""

from __future__ import annotations

from typing import Any

import torch

from raypar.compat import pytree
from raypar.graph.opgraph import OpGraph
from raypar.graph.states import Batch, Const, Mixed, Ramp, Reduced


def check_claims(graph: OpGraph, batch: Any, parts: int) -> int:
    """Asserts every claim about every op; returns how many there were."""
    model = graph._model
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]
    size = graph.global_batch // parts
    pieces = [
        [t if d is None else t.narrow(d, k * size, size)
         for t, d in zip(tensors, graph.batch_dims, strict=True)]
        for k in range(parts)
    ]  # fmt: skip
    whole = _values(graph, model, [tensors], graph.global_batch, {})
    several = _values(graph, model, pieces, size, graph.analysis.globals)
    checked = 0
    for key, state in graph.analysis.states.items():
        for index, one in enumerate(state if isinstance(state, tuple) else [state]):
            if key not in whole or isinstance(one, Mixed | Ramp):
                continue
            values = [_item(v, index) for v in several[key]]
            wanted = _item(whole[key][0], index)
            if key in graph.analysis.globals:
                assert torch.allclose(values[0].double(), wanted.double()), key
            else:
                found = _joined(one, values, parts)
                assert found.shape == wanted.shape, (key, one)
                assert torch.allclose(
                    found.to(torch.complex128), wanted.to(torch.complex128), equal_nan=True
                ), (key, one)
            checked += 1
    return checked


def _item(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list | tuple) else value


def _joined(state: Any, values: list[torch.Tensor], parts: int) -> torch.Tensor:
    if isinstance(state, Const):
        for value in values[1:]:
            assert torch.allclose(
                value.to(torch.complex128), values[0].to(torch.complex128), equal_nan=True
            ), state
        found = values[0]
    elif isinstance(state, Reduced):
        found = torch.stack([v * 1 for v in values]).sum(0)
    else:
        assert isinstance(state, Batch)
        dim, outer = state.dim, state.outer
        split = [v.unflatten(dim, (outer, v.shape[dim] // outer)) for v in values]
        found = torch.cat(split, dim + 1).flatten(dim, dim + 1)
    return found * float(parts) ** state.power if getattr(state, "power", 0) else found


def _values(graph, model, pieces, size, totals):
    """Id → value on every piece; batch-wide totals are added up before anyone reads them."""
    clean = graph.local(size)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}

    def given(key: str, k: int) -> torch.Tensor:
        kind, _, name = key.partition(":")
        if kind == "in":
            return pieces[k][int(name)]
        if kind == "const":
            return graph.clean.constants[key][1]
        if kind == "rng":
            return torch.tensor([3, 0, k * size])
        found = params[name] if kind == "param" else buffers[name]
        if found.is_meta:
            if key not in made:
                made[key] = torch.randn(found.shape, generator=generator).abs().to(found.dtype)
            found = made[key]
        return found.detach()

    envs: list[dict[Any, Any]] = [{} for _ in pieces]
    found: dict[str, list[Any]] = {}
    for node in clean.graph.nodes:
        if node.op == "output":
            continue
        key = node.meta["id"]
        for k, env in enumerate(envs):
            if node.op == "placeholder":
                env[node] = given(key, k)
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n, e=env: e[n])
            with torch.no_grad():
                env[node] = node.target(*args, **kwargs)
        if key in totals:
            total = sum(env[node] for env in envs)
            total = total * float(len(envs)) ** totals[key] if totals[key] else total
            for env in envs:
                env[node] = total
        if node.op != "placeholder":
            found[key] = [env[node] for env in envs]
    return found
