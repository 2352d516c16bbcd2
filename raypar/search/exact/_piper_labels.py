"""Labels of downsets, and what labels of looser and tighter bounds say about them.

A label says that the layers outside a downset can be run by stages with so many replicas and
devices in all. Walking on, fewer of both are better, so that a downset keeps a front of labels none
of which beats another. A looser bound only adds possibilities: its fronts are limits that no
tighter bound gets below, and the labels of a tighter one stay valid under a looser one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_WORD = 0xFFFFFFFF


@dataclass
class Pending:
    """Stages whose replicas are not settled yet, as parallel arrays.

    Attributes:
        low: Downset before the stage.
        label: Label that it is put in front of.
        degree: Number of its tensor-parallel degree.
        number: Number of its replicas in the list of allowed ones.
        divided: See `raypar.search.exact._piper_figures.Stages`.
        whole: Likewise.
        easy: Likewise, the most flights that need no recomputation.
    """

    low: Index
    label: Index
    degree: Index
    number: Index
    divided: Array
    whole: Array
    easy: Array

    def take(self, which: Mask | Index) -> Pending:
        """Some of them."""
        return Pending(
            self.low[which],
            self.label[which],
            self.degree[which],
            self.number[which],
            self.divided[which],
            self.whole[which],
            self.easy[which],
        )

    @classmethod
    def joined(cls, parts: Sequence[Pending]) -> Pending:
        """All of several."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class Labels:
    """Labels under one bound, in the order of downsets; grows level by level.

    Attributes:
        down: The downset.
        replicas: Replicas of all stages outside it.
        devices: Devices of all stages outside it.
        high: Downset with the first of these stages.
        stage: (replicas, number of degree) of that stage.
        after: (replicas, devices) of the stages behind it, at most.
        count: How many there are.
        first: Per downset its first label.
        number: Per downset how many it has.
    """

    _COLUMNS = ("down", "replicas", "devices", "high", "stage", "after")

    def __init__(self, n_downsets: int) -> None:
        self.down, self.replicas, self.devices, self.high = (
            np.zeros(256, np.int64) for _ in range(4)
        )
        self.stage, self.after = np.zeros((256, 2), np.int64), np.zeros((256, 2), np.int64)
        self.count = 0
        self.first = np.zeros(n_downsets, np.int64)
        self.number = np.zeros(n_downsets, np.int64)

    def add(self, columns: Sequence[Index]) -> None:
        """Appends labels, given as the columns in the order of the attributes, by downset."""
        start, end = self.count, self.count + len(columns[0])
        while end > len(self.down):
            for name in self._COLUMNS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        for name, values in zip(self._COLUMNS, columns, strict=True):
            getattr(self, name)[start:end] = values
        self.count = end
        down = self.down[start:end]
        differs = np.ones(len(down), bool)
        differs[1:] = down[1:] != down[:-1]
        heads = np.flatnonzero(differs)
        self.first[down[heads]] = start + heads
        self.number[down[heads]] = np.concatenate([heads[1:], [end - start]]) - heads

    def columns(self, which: Index) -> list[Index]:
        """Some labels' columns."""
        return [getattr(self, name)[which] for name in self._COLUMNS]

    def of(self, downsets: Index) -> Index:
        """The labels of some downsets, ascending if those are."""
        number = self.number[downsets]
        total = int(number.sum())
        skip = np.repeat(np.cumsum(number) - number, number)
        return np.repeat(self.first[downsets], number) + np.arange(total) - skip

    def chain(self, at: int) -> list[tuple[int, int, int, int]]:
        """(low, high, replicas, number of degree) of the stages that a label stands for."""
        found = []
        while self.number.size and self.stage[at, 0]:
            low, high = int(self.down[at]), int(self.high[at])
            found.append((low, high, int(self.stage[at, 0]), int(self.stage[at, 1])))
            options = self.of(np.array([high]))
            # The label it was put in front of may have been replaced by a better one.
            good = (self.replicas[options] <= self.after[at, 0]) & (
                self.devices[options] <= self.after[at, 1]
            )
            at = int(options[good.argmax()])
        return found


class Fronts:
    """The least figures that are known per downset while a level is worked on.

    Attributes:
        lean: (devices, replicas) of the label with the fewest devices, as one number.
        few: (replicas, devices) of the label with the fewest replicas, as one number.
    """

    def __init__(self, n_downsets: int, devices: int) -> None:
        self._none = (devices + 1) << 32
        self.lean = np.full(n_downsets, self._none, np.int64)
        self.few = np.full(n_downsets, self._none, np.int64)

    def note(self, down: Index, replicas: Index, devices: Index) -> None:
        """Takes labels into account."""
        np.minimum.at(self.lean, down, (devices << 32) | replicas)
        np.minimum.at(self.few, down, (replicas << 32) | devices)

    def improved(self, down: Index, replicas: Index, devices: Index) -> Mask:
        """Whether neither of the two known labels is as good in both figures."""
        lean, few = self.lean[down], self.few[down]
        better = (devices < lean >> 32) | (replicas < (lean & _WORD))
        better &= (replicas < few >> 32) | (devices < (few & _WORD))
        return better


def same_front(one: Labels, other: Labels) -> Mask:
    """Per downset whether both have the same front of labels, and one at all."""
    same = (one.number == other.number) & (one.number > 0)
    single = np.flatnonzero(same & (one.number == 1))
    a, b = one.first[single], other.first[single]
    same[single] = (one.replicas[a] == other.replicas[b]) & (one.devices[a] == other.devices[b])
    for down in np.flatnonzero(same & (one.number > 1)).tolist():
        a0, b0, n = int(one.first[down]), int(other.first[down]), int(one.number[down])
        same[down] = bool(
            (one.replicas[a0 : a0 + n] == other.replicas[b0 : b0 + n]).all()
            and (one.devices[a0 : a0 + n] == other.devices[b0 : b0 + n]).all()
        )
    return same
