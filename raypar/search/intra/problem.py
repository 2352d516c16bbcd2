"""The choice of a sharding as numbers: decisions, and links between them.

A decision picks one of several options (the strategy of a class of tied ops, or how a value that
comes in or goes out lies). A link is a value: its maker's option gives the state it is made in, its
readers' options the states they want, and every *different* wanted state is converted to once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass
class Decision:
    """One choice.

    Attributes:
        name: Id of the first op (or placeholder) it decides on.
        count: How many of them are decided together.
        seconds: Per option, of a whole step, of all of them.
        nbytes: Per option, bytes held, of all of them.
        picks: Original decision → which of its options each option means.
    """

    name: str
    count: int
    seconds: Floats
    nbytes: Floats
    picks: dict[int, Indices] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seconds)


@dataclass
class Reader:
    """One reader of a link.

    Attributes:
        decision: Who reads.
        wants: Per option of it the index of the wanted state.
        saves: Whether it keeps what it reads for its backward pass.
    """

    decision: int
    wants: Indices
    saves: bool = False


@dataclass(eq=False)  # a link is itself alone: its arrays cannot be compared as one truth
class Link:
    """One value (or a class of tied ones).

    Attributes:
        name: Id of the first such value.
        count: How many values.
        source: Who makes it.
        states: Per option of the maker the index of the state it is made in.
        readers: Its readers, at least one.
        cost: Seconds of a step, by made and wanted state; infinite where they do not go together.
        saved: Bytes held, by wanted state, where a reader saves it.
    """

    name: str
    count: int
    source: int
    states: Indices
    readers: list[Reader]
    cost: Floats
    saved: Floats

    @property
    def members(self) -> set[int]:
        """Decisions it depends on."""
        return {self.source, *(r.decision for r in self.readers)}


@dataclass
class Problem:
    """Decisions and links.

    Attributes:
        decisions: What is chosen; those that were merged into others have no options left.
        links: What their choices cost together.
    """

    decisions: list[Decision]
    links: list[Link]

    def total(self, choice: Mapping[int, int]) -> tuple[float, float]:
        """(seconds, bytes) of an option for every decision that has options."""
        seconds = [float(self.decisions[d].seconds[k]) for d, k in choice.items()]
        nbytes = [float(self.decisions[d].nbytes[k]) for d, k in choice.items()]
        for link in self.links:
            state = link.states[choice[link.source]]
            wants = {int(r.wants[choice[r.decision]]) for r in link.readers}
            kept = {int(r.wants[choice[r.decision]]) for r in link.readers if r.saves}
            seconds += [float(link.cost[state, w]) for w in wants]
            nbytes += [float(link.saved[w]) for w in kept]
        return float(np.sum(seconds)), float(np.sum(nbytes))


def priced(problem: Problem, byte_s: float, second_s: float = 1.0) -> Problem:
    """The same with a price on every byte held, added to the seconds.

    A value that several readers keep in one state is paid for by each of them.

    Args:
        problem: Left as it is.
        byte_s: Seconds for a byte.
        second_s: Seconds for a second; 0 where only bytes count.
    """
    decisions = [
        Decision(d.name, d.count, second_s * d.seconds + byte_s * d.nbytes, d.nbytes, d.picks)
        for d in problem.decisions
    ]
    links = []
    for link in problem.links:
        for reader in link.readers:
            if reader.saves:
                extra = byte_s * link.saved[reader.wants]
                decisions[reader.decision].seconds = decisions[reader.decision].seconds + extra
        fine = np.isfinite(link.cost)
        cost = np.where(fine, second_s * np.where(fine, link.cost, 0.0), np.inf)
        links.append(replace(link, cost=cost))
    return Problem(decisions, links)
