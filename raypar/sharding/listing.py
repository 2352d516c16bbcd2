"""What a lowered graph sends over its mesh: the collectives of its forward and its backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from raypar.sharding.convert import ALL_GATHER, COLLECTIVES, PAD


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """One conversion of a lowered graph that communicates.

    Attributes:
        value: Id of the value that is converted.
        axis: Name of the mesh axis.
        forward: Collective in the forward pass, or empty.
        backward: Collective in the backward pass (where the value gets a gradient), or empty.
        nbytes: Bytes of the larger of its two sides on one rank: what a reduction takes in, what
            a gather gives back.
    """

    value: str
    axis: str
    forward: str
    backward: str
    nbytes: int

    def __str__(self) -> str:
        way = " / ".join((self.forward or "-", self.backward or "-"))
        return f"{way} over {self.axis} of {self.value} ({self.nbytes} bytes)"


def collectives_of(graph: fx.Graph) -> Iterator[CollectiveUse]:
    """The collectives of a lowered graph, in order."""
    for node in graph.nodes:
        if node.target is not torch.ops.raypar.convert.default:
            continue
        source, forward, backward, _, _, axis, _ = node.args
        assert isinstance(source, fx.Node)
        ways = [kind if kind in COLLECTIVES else "" for kind in (str(forward), str(backward))]
        if not any(ways):
            continue
        large = node if forward in (ALL_GATHER, PAD) else source
        value = large.meta["val"]
        key = str(node.meta.get("id", node.name)).split(">")[0].split("~")[0]
        yield CollectiveUse(key, str(axis), ways[0], ways[1], value.numel() * value.element_size())
