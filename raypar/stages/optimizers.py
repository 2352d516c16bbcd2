"""Which optimizers may be given parts of parameters.

An element-wise rule gives every element what it gives on the whole parameter. One that looks at
rows, columns or whole tensors does not, and is refused where parameters are cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch

from raypar.errors import OptimizerError
from raypar.sharding.layout import Axes, ParamLayout

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""torch's optimizers that treat every element alone."""


def is_elementwise(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer class treats every element alone, as far as is known.

    It is one of `ELEMENTWISE`, a subclass of one that keeps its ``step``, or says so itself with
    a class attribute ``elementwise = True``.
    """
    if getattr(kind, "elementwise", False) is True:
        return True
    step = inspect.unwrap(kind.step)
    return any(
        issubclass(kind, known) and step is inspect.unwrap(known.step) for known in ELEMENTWISE
    )


def check_cut(
    optimizer: torch.optim.Optimizer, layouts: Mapping[str, ParamLayout], axes: Axes
) -> None:
    """Refuses an optimizer that would see parts of parameters and needs them whole.

    Args:
        optimizer: As built from the parts that one rank stores.
        layouts: Parameters of the rank group.
        axes: Its mesh.

    Raises:
        OptimizerError: Names a parameter that is cut, and what to change.
    """
    kind = type(optimizer)
    if is_elementwise(kind):
        return
    sizes = [size for _, size in axes]
    for name, layout in layouts.items():
        local = layout.stored.local_shape(layout.shape, sizes)
        if local == layout.shape:
            continue
        taken = layout.held.value().local_shape(layout.shape, sizes)
        change = (
            "give the stages that read it memory.zero = 0"
            if taken == layout.shape
            else "leave the ops that read it out of the stage's sharding (they are then whole), "
            "with memory.zero = 0"
        )
        raise OptimizerError(
            f"optimizer {kind.__name__} is not known to treat every element of a parameter alone, "
            f"and a rank holds just {local} of {name!r} {layout.shape} (stored as "
            f"{layout.stored} on {dict(axes)}): {change}; or use an element-wise one, for example "
            "torch.optim.AdamW; or, if it is element-wise, say so with a class attribute "
            "elementwise = True"
        )
