"""A moving average of the weights, cut over the ranks as the optimizer's state is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raypar.stages.holdings import Holdings


class WeightAverage:
    """An exponential moving average of what one rank stores of the parameters.

    It is element-wise, so the parts that ranks store average to the parts of the average. It does
    what ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))``
    does: it begins as the initial model, the first update copies, later ones average, and buffers
    are those of the model at the last update.

    Args:
        holdings: What the rank holds.
        decay: Share of the old average that an update keeps.

    Attributes:
        stored: The averages by parameter name, each of the form of ``Holdings.stored``. One that
            is not trained is the parameter itself.
        updates: How many there were.
    """

    def __init__(self, holdings: Holdings, decay: float) -> None:
        self._holdings = holdings
        self._average = get_ema_multi_avg_fn(decay)
        self.updates = 0
        # Views of whole parameters become dense: an average has just the stored part's memory.
        self.stored = {
            name: p.detach().clone(memory_format=torch.contiguous_format)
            if p.requires_grad
            else p.detach()
            for name, p in holdings.stored.items()
        }
        self.buffers: Mapping[str, torch.Tensor] = dict(holdings.buffers)

    def update(self) -> None:
        """Takes in the parameters as they are now."""
        pairs: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, param in self._holdings.stored.items():
            if param.requires_grad:
                averages, now = pairs.setdefault(param.dtype, ([], []))
                averages.append(self.stored[name])
                now.append(param.detach())
        for averages, now in pairs.values():
            if self.updates:
                self._average(averages, now, self.updates)
            else:
                for average, value in zip(averages, now, strict=True):
                    average.copy_(value)
        # Programs return new buffers and never write into old ones, so that these stay.
        self.buffers = dict(self._holdings.buffers)
        self.updates += 1

    def tensors(self) -> list[torch.Tensor]:
        """The memory that it needs beside the parameters."""
        params = self._holdings.stored
        return [t for name, t in self.stored.items() if params[name].requires_grad]
