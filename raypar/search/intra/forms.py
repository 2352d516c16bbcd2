"""Shard decisions from outside: layers that are told how to be cut, in the field's words.

A search over plans forces some layers and leaves the rest to the integer program, which honours
what is forced (`take_forms`) and solves everything else around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from raypar.errors import ConfigError, did_you_mean
from raypar.graph.opgraph import OpGraph
from raypar.search.intra.settings import Allowed
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import is_shard, shard_dim

FORMS = ("batch", "row", "column", "sequence", "expert")
"""``batch`` and ``sequence`` cut the activations along dim 0 or 1 and keep the parameter whole;
``column`` cuts the parameter along its output features, ``row`` along its input features (of a
table: along its rows), ``expert`` one of several matrices each along the first dim."""

_ACTIVATION_DIM = {"batch": 0, "sequence": 1}
_TABLES = ("embedding", "embedding_bag")


def form_pattern(parameter: str) -> str:
    """The name of a parameter with ``*`` for the numbers of repeated layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", parameter)


def parameter_groups(graph: OpGraph, most: int = 12) -> dict[str, int]:
    """Parameters that one decision can be taken for: pattern → elements, the largest first.

    Args:
        graph: The captured model.
        most: So many groups at most.
    """
    found: dict[str, int] = {}
    for name, (shape, _, trained) in graph.params.items():
        if trained and len(shape) >= 2:
            pattern = form_pattern(name)
            found[pattern] = found.get(pattern, 0) + torch.Size(shape).numel()
    largest = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:most]
    return dict(largest)


def forms_of(graph: OpGraph, pattern: str) -> tuple[str, ...]:
    """The forms that can make sense for a group of parameters, by their number of dims."""
    dims = max(len(s) for n, (s, _, _) in graph.params.items() if form_pattern(n) == pattern)
    return FORMS if dims == 3 else FORMS[:-1]


def take_forms(forms: Sequence[tuple[str, str]], otherwise: Allowed | None = None) -> Allowed:
    """A filter that leaves ops only strategies of the form that their parameter is told.

    On a mesh of several axes one of them has the form and the others are free. Where no strategy
    of an op has it, the op runs whole.

    Args:
        forms: (parameter pattern as `form_pattern` makes them, one of `FORMS`).
        otherwise: Filter of all other ops.

    Raises:
        ConfigError: No such form.
    """
    wanted: Mapping[str, str] = dict(forms)
    for form in wanted.values():
        if form not in FORMS:
            raise ConfigError(
                f"form {form!r} is unknown; valid are {', '.join(FORMS)}."
                f"{did_you_mean(form, FORMS)}"
            )

    def allowed(op: OpView, strategy: Strategy) -> bool:
        for position, tensor in enumerate(op.tensors):
            key = str(tensor.meta.get("id", ""))
            form = wanted.get(form_pattern(key[6:])) if key.startswith("param:") else None
            if form is not None:
                axes = range(len(strategy.inputs[position]))
                return any(_has(form, op, strategy, position, axis) for axis in axes)
        return otherwise is None or otherwise(op, strategy)

    return allowed


def _has(form: str, op: OpView, strategy: Strategy, position: int, axis: int) -> bool:
    state = strategy.inputs[position][axis]
    dim = shard_dim(state) if is_shard(state) else None
    if form in _ACTIVATION_DIM:
        made = strategy.outputs[0][axis]
        return dim is None and is_shard(made) and shard_dim(made) == _ACTIVATION_DIM[form]
    if dim is None:
        return False
    shape = op.tensors[position].meta["val"].shape
    if form == "expert":
        return len(shape) >= 3 and dim == 0
    if op.name in _TABLES:
        return dim == (1 if form == "column" else 0)
    if len(shape) == 3:  # one matrix for each expert, inputs before outputs
        return dim == (2 if form == "column" else 1)
    return dim == (0 if form == "column" else 1)
