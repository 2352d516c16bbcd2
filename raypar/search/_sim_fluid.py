"""Time for the simulator: activities that share resources, and a queue of what ends when.

An activity has work (the seconds it takes alone) and asks for a share of some resources. As long
as what is asked of every resource fits, all go at full speed; where it does not, everybody there
slows down by the same factor (fluid sharing in proportion to demand, as the flow models of network
simulators: Casanova et al. 2014, "Versatile, scalable, and accurate simulation of distributed
applications and platforms", section 3). An activity goes as fast as its most crowded resource
lets it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

FULL = 1 << 20
"""A whole resource. Demands are whole numbers of its parts, so that loads add up without drift."""

Uses = tuple[tuple[int, int], ...]
"""(resource, parts of `FULL` asked for) of an activity."""


class _Activity:
    """Work under way on shared resources."""

    __slots__ = ("argument", "call", "left", "load", "since", "uses", "version")

    def __init__(self, work: float, uses: Uses, call: Callable[[Any], None], argument: Any) -> None:
        self.left = work
        self.uses = uses
        self.call = call
        self.argument = argument
        self.since = 0.0
        self.load = FULL  # of its most crowded resource: the speed is FULL / load
        self.version = 0


class FluidClock:
    """Runs activities in time.

    Args:
        resources: How many resources there are; they are numbered from 0.

    Attributes:
        now: The time, in seconds.
    """

    def __init__(self, resources: int) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, int, _Activity | None, Any, Any]] = []
        self._number = 0
        self._load = [0] * resources
        # Dicts keep the order of arrival, so that equal runs give equal results.
        self._users: list[dict[_Activity, None]] = [{} for _ in range(resources)]

    def at(self, time: float, call: Callable[[Any], None], argument: Any) -> None:
        """Calls at a time."""
        self._number += 1
        heapq.heappush(self._queue, (time, self._number, 0, None, call, argument))

    def begin(self, work: float, uses: Uses, call: Callable[[Any], None], argument: Any) -> None:
        """Starts an activity; `call` is called when its work is done.

        Args:
            work: Seconds that it takes alone.
            uses: Its resources; none for what nobody can slow down.
            call: What to call, with `argument`.
            argument: What to hand on.
        """
        if not uses:
            self._number += 1
            heapq.heappush(self._queue, (self.now + work, self._number, 0, None, call, argument))
            return
        activity = _Activity(work, uses, call, argument)
        activity.since = self.now
        crowded = False
        for resource, demand in uses:
            self._load[resource] += demand
            self._users[resource][activity] = None
            crowded = crowded or self._load[resource] > FULL
        if crowded:
            self._pace(uses)
        if activity.version == 0:
            self._push(activity)

    def run(self) -> None:
        """Goes on until nothing is under way."""
        queue = self._queue
        pop = heapq.heappop
        while queue:
            time, _, version, activity, call, argument = pop(queue)
            if activity is None:
                self.now = time
                call(argument)
            elif activity.version == version:
                self.now = time
                self._end(activity)
                activity.call(activity.argument)

    def _push(self, activity: _Activity) -> None:
        self._number += 1
        end = self.now + activity.left * (activity.load / FULL)
        heapq.heappush(self._queue, (end, self._number, activity.version, activity, None, None))

    def _end(self, activity: _Activity) -> None:
        crowded = False
        for resource, demand in activity.uses:
            crowded = crowded or self._load[resource] > FULL
            self._load[resource] -= demand
            del self._users[resource][activity]
        if crowded:
            self._pace(activity.uses)

    def _pace(self, uses: Uses) -> None:
        """Gives everybody on these resources the speed that the loads allow now."""
        load = self._load
        touched = dict.fromkeys(a for resource, _ in uses for a in self._users[resource])
        for activity in touched:
            worst = max(FULL, max(load[resource] for resource, _ in activity.uses))
            if worst == activity.load:
                continue
            activity.left -= (self.now - activity.since) * (FULL / activity.load)
            activity.left = max(activity.left, 0.0)
            activity.since = self.now
            activity.load = worst
            activity.version += 1
            self._push(activity)
