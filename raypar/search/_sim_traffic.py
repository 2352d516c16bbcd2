"""Bytes that devices send in a step, and for how long their ports are needed."""

from __future__ import annotations

import numpy as np

from raypar.search._sim_fabric import TIERS, Floats, Ints

ByPort = dict[tuple[int, str], float]
"""(device, tier) → a figure of its port out."""


class Traffic:
    """Counts what goes out of every device.

    Args:
        devices: How many there are.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        ports = len(TIERS) * devices
        self._sent, self._busy = np.zeros(ports), np.zeros(ports)
        self._used = np.zeros(ports, dtype=bool)

    def add(
        self, tiers: Ints | int, devices: Ints, sent: Ints | float, busy: Floats | float
    ) -> None:
        """Adds what devices send; a device may be named several times.

        Args:
            tiers: Numbers of the tiers (`TIERS`) that they send to.
            devices: The senders.
            sent: Bytes of each.
            busy: Seconds of each.
        """
        ports = tiers * self._devices + devices
        np.add.at(self._sent, ports, sent)
        np.add.at(self._busy, ports, busy)
        self._used[ports] = True

    def tables(self) -> tuple[ByPort, ByPort]:
        """Bytes and seconds of all ports that were named."""
        used = np.flatnonzero(self._used)
        tiers, devices = (part.tolist() for part in np.divmod(used, self._devices))
        keys = [(device, TIERS[tier]) for device, tier in zip(devices, tiers, strict=True)]
        sent, busy = (found[used].tolist() for found in (self._sent, self._busy))
        return dict(zip(keys, sent, strict=True)), dict(zip(keys, busy, strict=True))
