"""Which weights a rank evaluates with: those that it trains, or their moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from raypar.errors import OptimizerError
from raypar.stages.average import WeightAverage
from raypar.stages.holdings import Holdings

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def weights_in_use(
    name: str, holdings: Holdings, average: WeightAverage | None, spread: Callable[[], None]
) -> Iterator[tuple[Tensors, Tensors]]:
    """The parameters and buffers to evaluate with.

    The moving average has just the parts that the rank stores. While it is in use it stands in
    their place, and goes to the ranks that need it as an optimizer's updates do; what was there is
    put back afterwards, bit for bit.

    Args:
        name: ``live`` or ``ema``.
        holdings: What the rank holds.
        average: The moving average, if the recipe has one.
        spread: Brings stored parts to every rank whose programs take them.

    Yields:
        Name → part that programs take, of every parameter; name → value of every buffer.

    Raises:
        OptimizerError: There is no such set of weights.
    """
    if name == "live":
        yield holdings.params, holdings.buffers
        return
    if name != "ema" or average is None:
        raise OptimizerError(
            "there is no moving average of the weights to evaluate with: set ema_decay, for "
            "example 0.999"
            if name == "ema"
            else f"weights={name!r}; valid are 'live' and 'ema'"
        )
    trained = {n: p for n, p in holdings.stored.items() if p.requires_grad}
    kept = {n: p.detach().clone() for n, p in trained.items()}

    def put(values: Tensors) -> None:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(values[n])
            spread()

    put(average.stored)
    yield holdings.params, average.buffers
    put(kept)
