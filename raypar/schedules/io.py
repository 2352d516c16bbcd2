"""What a schedule needs to know of a plan's stages: the values that cross between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edge:
    """One value routed from the stage that makes it to every stage that uses it.

    Attributes:
        name: The value's name, unique in the plan (canonical op id, and output index if many).
        source: The producing stage.
        targets: The consuming stages, ascending, all greater than `source`.
        differentiable: Whether every target sends a gradient back.
        nbytes: Size of the value for one microbatch on one replica, in bytes.
    """

    name: str
    source: int
    targets: tuple[int, ...]
    differentiable: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class StageIO:
    """The stages of a plan as a schedule sees them.

    Attributes:
        n_stages: Number of stages.
        rank_of: For every stage, its *rank group* (0-based): stages of equal group share devices.
        edges: Every crossing value.
        splits: For every stage, whether its backward divides into input and weight halves; a
            stage that does not (or that has no input gradient) does all its work in the input
            half, and its weight half is empty.
    """

    n_stages: int
    rank_of: tuple[int, ...]
    edges: tuple[Edge, ...]
    splits: tuple[bool, ...]
