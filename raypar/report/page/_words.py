"""What the parts of a step and of a rank's memory are called on the page."""

from __future__ import annotations

from raypar._plan_text import duration

KINDS = {
    "F": ("forward", "a forward pass of one microbatch"),
    "B": ("backward", "a whole backward pass of one microbatch"),
    "I": ("backward, input half", "gradients of what the stage was sent"),
    "W": ("backward, weight half", "gradients of the stage's parameters"),
    "O": ("optimizer", "updates parameters and begins the step"),
    "G": ("counts", "the batch is counted"),
    "data": ("input", "waits for the inputs of the step"),
    "other": ("interpreter", "what the interpreter does itself"),
    "comm": ("communication", "waits for a transfer or collective that is under way"),
    "wait": ("idle", "waits for somebody who has not sent yet: the bubble"),
}
"""Kind of span → its name, and what it means."""

MEMORY = {
    "parameters": ("parameters", "weights as stored and as programs take them"),
    "optimizer": ("optimizer", "states of the optimizer"),
    "gradients": ("gradients", "gradients of parameters, from first backward to optimizer"),
    "buffers": ("buffers", "buffers and constants"),
    "overhead": ("overhead", "what libraries take and the allocator cannot use"),
    "saved": ("activations", "kept from a forward pass to its backward"),
    "edges": ("stage borders", "values and gradients that cross stages"),
    "transit": ("in transit", "arrived and not yet asked for, or done with and not yet gone"),
    "transient": ("workspace", "held within one forward or backward only"),
}
"""Part of a rank's memory → its name, and what it means; in the order in which bars stack them."""

FIDELITY = {
    "quick": "the sums that the solvers use",
    "simulated": "lowered and played with the analytic cost model",
    "learned": "played with the learned cost model",
    "profiled": "the same, one of its stages run alone",
    "measured": "steps that really ran",
}

STATE = {
    "kept": "looked at to the end",
    "pruned": "a cheap figure told that it cannot win",
    "infeasible": "no such plan, or more memory than there is",
    "failed": "an error",
}
"""State of a trial → what it means."""


def moment(seconds: float) -> str:
    """Seconds with a unit, as on a time axis: its beginning is ``0``."""
    return duration(seconds) if seconds else "0"
