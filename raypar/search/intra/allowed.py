"""Filters that leave only some strategies of every op: hand-made plans, and forced choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raypar.errors import ConfigError, did_you_mean
from raypar.search.intra.settings import Allowed
from raypar.sharding.rules.base import OpView, Strategy
from raypar.sharding.spec import P, is_shard, shard_dim

MODES = ("free", "batch", "tensor", "none")


def allow(modes: Sequence[str], batch_dim: int = 0) -> Allowed:
    """A filter by mesh axis.

    Args:
        modes: For every axis: ``free``; ``batch`` (activations are cut over the batch, parameters
            are whole: data parallelism); ``tensor`` (no activation is cut over the batch: tensor
            parallelism as in Megatron-LM, sequence parallelism included); ``none`` (all is whole).
        batch_dim: Which dim of activations is the batch.

    Raises:
        ConfigError: No such mode.
    """
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(
                f"intra-op mode {mode!r} is unknown; valid are {', '.join(MODES)}."
                f"{did_you_mean(mode, MODES)}"
            )

    def allowed(op: OpView, strategy: Strategy) -> bool:
        return all(
            _fits(mode, op, strategy, axis, batch_dim)
            for axis, mode in enumerate(modes)
            if mode != "free"
        )

    return allowed


def force(choices: Mapping[str, str], otherwise: Allowed | None = None) -> Allowed:
    """A filter that leaves named ops one strategy.

    Args:
        choices: Op id → strategy text.
        otherwise: Filter of all other ops.
    """

    def allowed(op: OpView, strategy: Strategy) -> bool:
        text = choices.get(str(op.node.meta["id"]))
        if text is not None:
            return str(strategy) == text
        return otherwise is None or otherwise(op, strategy)

    return allowed


def _fits(mode: str, op: OpView, strategy: Strategy, axis: int, batch_dim: int) -> bool:
    if mode == "none":
        return all(not is_shard(s[axis]) for s in (*strategy.inputs, *strategy.outputs))
    params = [str(t.meta.get("id", "")).startswith("param:") for t in op.tensors]
    specs = list(zip(strategy.inputs, params, strict=True))
    cuts = [s[axis] for s, param in specs if not param] + [s[axis] for s in strategy.outputs]
    dims = {shard_dim(state) for state in cuts if is_shard(state)}
    if mode == "batch":
        whole = not any(param and is_shard(s[axis]) for s, param in specs)
        return whole and (dims <= {batch_dim} or P in cuts)
    return batch_dim not in dims
