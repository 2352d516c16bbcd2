"""The library in one page: capture, plan, look, train.

python -m examples.quickstart
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

import raypar as rp
from examples.data import stdlib_bytes
from examples.models import GPT, gpt


def make_model() -> GPT:
    """A GPT small enough for any laptop."""
    return gpt(layers=4, width=64, heads=4, seq_len=64)


def make_data() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of the standard library's source."""
    return stdlib_bytes(global_batch=16, seq_len=64)


def make_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Called on every rank with the parameters that it holds."""
    return torch.optim.AdamW(parameters, lr=3e-3)


def main() -> None:
    """Plans for two devices of this machine and trains on them."""
    cluster = rp.Cluster.local(2)
    graph = rp.capture(make_model, next(iter(make_data())))
    plan = rp.plan(graph, cluster, rp.SearchConfig(stages=2, microbatches=4))
    print(rp.explain(plan, graph, cluster))

    result = rp.Trainer(
        make_model,
        optimizer=make_optimizer,
        data=make_data,
        plan=plan,
        steps=50,
        clip_norm=1.0,
        scaling_config=rp.ScalingConfig(num_workers=2),
        run_config=rp.RunConfig(storage_path="runs"),
    ).fit()
    print(f"loss {result.metrics['loss']:.3f}, files in {result.path}")


if __name__ == "__main__":
    main()
