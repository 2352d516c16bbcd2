"""Real measurements, as a search asks for them: who makes them is given from outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from raypar.mesh.devices import DeviceKind
from raypar.plan import Plan

if TYPE_CHECKING:
    from raypar.search.cost.stage_job import StageJob


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """What one stage was measured at on its slowest rank, per microbatch.

    Attributes:
        forward_s: Seconds of a forward pass, without waiting for others.
        backward_s: The same for a whole backward pass (both halves where it is split).
        optimizer_s: Seconds of the optimizer, once a step.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Some steps of a plan that really ran.

    Attributes:
        step_s: Typical seconds of a step (the median).
        spread: Half of the middle half of the steps' times, relative to `step_s`.
        steps: Steps that count.
        took_s: Seconds of the whole measurement, start-up included.
        stages: Per stage what was measured inside; empty where that is not known.
        peak_bytes: Most bytes that a rank held; 0 where that is not known.
        disturbed: Share of the machine's cores that other programs took meanwhile: above some
            percent, the figures are rough.
    """

    step_s: float
    spread: float
    steps: int
    took_s: float
    stages: tuple[StageSeconds, ...] = field(default=())
    peak_bytes: int = 0
    disturbed: float = 0.0


class Measurer(Protocol):
    """Runs steps of plans of one model on one cluster."""

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        """Runs a plan for about `seconds` (at least a few steps).

        Raises:
            RayparError: The plan did not run (out of memory, say); the search goes on without it.
        """
        ...

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        """Runs plans in turns, a few steps each, so that what disturbs one disturbs all.

        Args:
            plans: Plans that are to be compared.
            seconds: About how long each runs in all.
        """
        ...

    def close(self) -> None:
        """Gives everything back; safe to call twice."""
        ...


@dataclass(frozen=True, slots=True)
class ProfiledStage:
    """What the programs of one stage took, alone on one device.

    Attributes:
        seconds: Of a forward pass, a backward pass, and the two halves of one; 0 for halves that
            were not asked for.
        working_bytes: Most bytes that one microbatch held from its forward to the end of its
            backward, besides what was given; 0 where that is not known.
        took_s: Seconds of the whole measurement, compilation included.
    """

    seconds: tuple[float, float, float, float]
    working_bytes: int = 0
    took_s: float = 0.0


class StageProfiler(Protocol):
    """Runs the programs of single stages, each alone on one device."""

    def lacks(self, kind: DeviceKind) -> str:
        """Why stages for such a device cannot be profiled here; empty where they can."""
        ...

    def profile_stage(self, job: StageJob, kind: DeviceKind, device: int) -> ProfiledStage:
        """Runs a stage's programs a few times.

        Args:
            job: The stage.
            kind: What it is to run on.
            device: Number of such a device that the plan gives it; any of its kind will do.

        Raises:
            RayparError: The programs did not run (out of memory, say); the search goes on.
        """
        ...
