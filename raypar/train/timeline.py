"""When every rank did what, in the last steps of a run: what ``timeline.json`` holds.

Times are those of the ranks' stamps (`raypar.stages.spec.StepReport.stamps`), as the clock of the
first rank's node tells them; see `raypar.train.breakdown` for how clocks are set.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypar.errors import ConfigError, ScheduleError
from raypar.schedules.instructions import Instruction
from raypar.stages.faults import RankInfo
from raypar.stages.spec import StepReport
from raypar.train.breakdown import Breakdown, RankLists, meetings_of

TIMELINE_FORMAT = 1
TIMELINE_FILE = "timeline.json"
_KEPT, _MOST_STAMPS = 16, 100_000


@dataclass(frozen=True, slots=True)
class Timeline:
    """Some consecutive steps, as they went.

    Attributes:
        lists: The ranks and their instruction lists.
        stages: Stages of every rank.
        devices: Device of every rank.
        steps: Number of every step.
        stamps: ``[steps, stamps of all ranks in a row]`` (`RankLists.starts`), in seconds from the
            first one.
        held: What every rank holds from step to step: ``parameters``, ``gradients``,
            ``optimizer``, ``total``, in bytes; empty where that is not known.
        saved: What every rank held for backward after each instruction, in bytes, in its first
            step; empty where that is not known.
    """

    lists: RankLists
    stages: tuple[tuple[int, ...], ...]
    devices: tuple[int, ...]
    steps: tuple[int, ...]
    stamps: np.ndarray
    held: tuple[dict[str, int], ...] = ()
    saved: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal timeline, times in whole 100 ns."""
        return json.dumps(
            {
                "format": TIMELINE_FORMAT,
                "lists": [" ".join(map(str, one)) for one in self.lists.lists],
                "ranks": [
                    {"group": group, "replica": replica, "node": node, "stages": own, "device": d}
                    for (group, replica), node, own, d in zip(
                        self.lists.ranks, self.lists.nodes, self.stages, self.devices, strict=True
                    )
                ],
                "steps": list(self.steps),
                "stamps_us": np.round(self.stamps * 1e6, 1).tolist(),
                "held": list(self.held),
                "saved": [list(one) for one in self.saved],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: It is something else, or of a newer format.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            found = raw.get("format") if isinstance(raw, dict) else None
            if isinstance(found, int) and found > TIMELINE_FORMAT:
                raise ConfigError(
                    f"the timeline has format {found}, this raypar reads up to "
                    f"{TIMELINE_FORMAT}: upgrade raypar"
                )
            lists = RankLists(
                tuple(tuple(map(Instruction.parse, one.split(" "))) for one in raw["lists"]),
                tuple((int(one["group"]), int(one["replica"])) for one in raw["ranks"]),
                tuple(str(one["node"]) for one in raw["ranks"]),
            )
            meetings_of(lists)  # every receive has its send
            stamps = np.array(raw["stamps_us"], dtype=np.float64) / 1e6
            steps = tuple(int(step) for step in raw["steps"])
            if stamps.shape != (len(steps), lists.starts[-1]) or not np.isfinite(stamps).all():
                raise ValueError(f"stamps of shape {stamps.shape}")
            held, saved = raw["held"], raw["saved"]
            if not all(isinstance(one, list) and len(one) in (0, len(lists.ranks))
                       for one in (held, saved)):  # fmt: skip
                raise ValueError("memory is told of some ranks only")
            return cls(
                lists,
                tuple(tuple(map(int, one["stages"])) for one in raw["ranks"]),
                tuple(int(one["device"]) for one in raw["ranks"]),
                steps,
                stamps,
                tuple({str(k): int(v) for k, v in one.items()} for one in held),
                tuple(tuple(map(int, one)) for one in saved),
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"this is no timeline: {type(error).__name__}: {error}") from None
        except (ScheduleError, RecursionError, OverflowError) as error:
            raise ConfigError(f"this is no timeline: {error}") from None


class TimelineRecorder:
    """Keeps the stamps of the last steps, and what ranks told of memory in their first.

    Of large runs fewer steps are kept, but two: they show one whole step.

    Args:
        breakdown: Knows the ranks and sets their clocks.
        infos: The ranks.
    """

    def __init__(self, breakdown: Breakdown, infos: Sequence[RankInfo]) -> None:
        self._breakdown = breakdown
        self._infos = list(infos)
        stamps = max(breakdown.lists.starts[-1], 1)
        kept = min(_KEPT, max(2, _MOST_STAMPS // stamps))
        self._last: deque[tuple[int, Sequence[StepReport]]] = deque(maxlen=kept)
        self._held: tuple[dict[str, int], ...] = ()
        self._saved: tuple[tuple[int, ...], ...] = ()

    def add(self, step: int, reports: Sequence[StepReport]) -> None:
        """Notes one more step."""
        if self._last and self._last[-1][0] != step - 1:
            self._last.clear()
        if reports and any(report.held for report in reports):
            self._held = tuple(report.held for report in reports)
            self._saved = tuple(report.saved_over for report in reports)
        self._last.append((step, reports))

    def timeline(self) -> Timeline | None:
        """What was kept; None where ranks gave no stamps."""
        rows = [(step, self._breakdown.stamps(reports)) for step, reports in self._last]
        known = [(step, stamps) for step, stamps in rows if stamps is not None]
        if not known:
            return None
        stamps = np.array([own for _, own in known])
        return Timeline(
            self._breakdown.lists,
            tuple(info.stages for info in self._infos),
            tuple(info.device for info in self._infos),
            tuple(step for step, _ in known),
            stamps - stamps.min(),
            self._held,
            self._saved,
        )

    def write(self, folder: Path) -> None:
        """Writes ``timeline.json``, where there is something to write; at once, or not at all."""
        found = self.timeline()
        if found is not None:
            fresh = folder / f"{TIMELINE_FILE}.new"
            fresh.write_text(found.to_json() + "\n", encoding="utf-8")
            os.replace(fresh, folder / TIMELINE_FILE)
