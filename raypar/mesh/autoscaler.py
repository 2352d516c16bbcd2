"""Devices that are not there yet: asked of Ray's autoscaler, and waited for.

A request to the autoscaler is one value for the whole cluster: it replaces the one before, counts
what is there whether it is in use or not, and stays until somebody clears it, also after the
process that made it is gone. So it is made for as long as a run has not got its devices, and
cleared by a ``with`` block. Two runs that ask at the same time replace each other's request; the
one that loses still gets what its wait finds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import ray
from ray.autoscaler.sdk import request_resources

from raypar.compat_ray import ray_autoscaler

_LOOK_S = 0.25
_QUIET_S = 20.0
"""An autoscaler that has launched nothing for so long will not: it looks every 5 s by default."""


@dataclass(frozen=True)
class Waited:
    """What waiting for devices came to.

    Attributes:
        devices: How many are there now.
        seconds: How long it took.
        why: Why it ended: ``there``, ``no autoscaler``, ``nothing comes``, ``time is up``.
    """

    devices: int
    seconds: float
    why: str


class ScaleRequest:
    """What this process asks of the autoscaler; cleared at the end of a ``with`` block."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self, bundle: Mapping[str, float], count: int) -> None:
        """Asks for a cluster that holds `count` such bundles."""
        self._asked = True  # first: a signal may come in between
        request_resources(bundles=[dict(bundle)] * count)

    def clear(self) -> None:
        """Takes the request back; safe to call twice, and after Ray ended."""
        if self._asked and ray.is_initialized():
            with contextlib.suppress(Exception):  # a cluster that is gone asks for nothing
                request_resources(bundles=[])
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()


def has_autoscaler() -> bool:
    """Whether the cluster may grow by itself."""
    return ray_autoscaler()[0]


def await_devices(
    count: Callable[[], int],
    wanted: int,
    least: int,
    timeout_s: float,
    *,
    grows: Callable[[], tuple[bool, int]] = ray_autoscaler,
    quiet_s: float | None = None,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Waited:
    """Waits until the cluster has the devices, or no more can be expected.

    It ends early where no autoscaler runs; and, once there are `least`, where the autoscaler has
    brought nothing up for a while: its limits are reached, or it has none of the kind.

    Args:
        count: Tells how many devices there are.
        wanted: How many are enough.
        least: How few will do.
        timeout_s: Seconds to wait at most.
        grows: Tells whether there is an autoscaler, and how many nodes it is bringing up.
        quiet_s: Seconds without any sign of the autoscaler that mean it brings nothing (20).
        now: The clock.
        sleep: Waits.
    """
    quiet_s = _QUIET_S if quiet_s is None else quiet_s
    began = quiet_since = now()
    before = -1
    while True:
        there, at = count(), now()
        if there >= wanted:
            return Waited(there, at - began, "there")
        present, coming = grows()
        if not present:
            return Waited(there, at - began, "no autoscaler")
        if coming or there != before:
            quiet_since, before = at, there
        if there >= least and at - quiet_since >= quiet_s:
            return Waited(there, at - began, "nothing comes")
        if at - began >= timeout_s:
            return Waited(there, at - began, "time is up")
        sleep(min(_LOOK_S, max(0.0, began + timeout_s - at)))
