"""What a rank observes of its own step: memory held for backward, and where a NaN began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


class SavedMeter:
    """Bytes of real storages that stages hold between forward and backward.

    Shapes are the same in every step, so the first step's peaks stand for all; after it, `close`
    makes every call free.

    Attributes:
        peaks: Stage → the most that it held at once.
        most: The most that all stages together held at once.
        marks: What all stages together held at each `mark`.
    """

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self.most = 0
        self.marks: list[int] = []
        self._live: dict[int, dict[int, dict[int, int]]] = {}
        self._now = 0
        self._open = True

    @property
    def open(self) -> bool:
        """Whether it still measures."""
        return self._open

    def hold(
        self, stage: int, microbatch: int, box: Iterable[Any], free: Iterable[torch.Tensor]
    ) -> None:
        """Notes what `box` holds, but for storages that live anyway (`free`)."""
        known = {t.untyped_storage().data_ptr() for t in free}
        storages = [t.untyped_storage() for t in box if isinstance(t, torch.Tensor)]
        sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}
        live = self._live.setdefault(stage, {})
        live[microbatch] = sizes
        self.peaks[stage] = max(self.peaks.get(stage, 0), _bytes(live.values()))
        self._now = self._all()
        self.most = max(self.most, self._now)

    def drop(self, stage: int, microbatch: int) -> None:
        """The stage let go of what it held for a microbatch."""
        if self._open and self._live.get(stage, {}).pop(microbatch, None) is not None:
            self._now = self._all()

    def mark(self) -> None:
        """Notes what is held now, after one more instruction."""
        if self._open:
            self.marks.append(self._now)

    def _all(self) -> int:
        return _bytes(part for parts in self._live.values() for part in parts.values())

    def close(self) -> None:
        """Stops measuring."""
        self._open = False
        self._live.clear()


def _bytes(parts: Iterable[Mapping[int, int]]) -> int:
    """Bytes of all storages, each counted once."""
    return sum({key: size for part in parts for key, size in part.items()}.values())


class FiniteWatch:
    """Adds up what leaves each stage, so that a NaN or an infinity can be traced to its origin."""

    def __init__(self) -> None:
        self.losses: dict[int, torch.Tensor] = {}
        self._activations: dict[int, torch.Tensor] = {}

    def activation(self, stage: int, value: torch.Tensor) -> None:
        """A value that another stage will read."""
        if value.is_floating_point():
            _add(self._activations, stage, value.sum(dtype=torch.float32))

    def loss(self, stage: int, value: torch.Tensor) -> None:
        """The loss of one microbatch."""
        _add(self.losses, stage, value)

    def global_share(self, scales: Mapping[int, float]) -> float | None:
        """This rank's share of the global loss; None where no stage here makes it."""
        if not self.losses:
            return None
        return sum(float(total.double() * scales[s]) for s, total in self.losses.items())

    def blame(self, stages: Iterable[int], gradients_finite: bool) -> str | None:
        """The first place in graph order that was not finite, or None."""
        ordered = sorted(stages)
        for stage in ordered:
            for what, found in (("activations", self._activations), ("loss", self.losses)):
                if stage in found and not torch.isfinite(found[stage]):
                    return f"stage {stage} {what}"
        return None if gradients_finite else f"stage {ordered[-1]} gradients"


def _add(totals: dict[int, torch.Tensor], stage: int, value: torch.Tensor) -> None:
    known = totals.get(stage)
    totals[stage] = value if known is None else known + value
