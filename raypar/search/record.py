"""What a search did, as data: reports draw it, plan caches keep it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from raypar.errors import PlanError

RECORD_FORMAT = 1
FIDELITIES = ("quick", "simulated", "learned", "profiled", "measured")
"""What a step time rests on, cheapest first: the sums that the solvers use; the plan lowered and
played with the analytic cost model; the same with the learned one; the same once one of its stages
was run alone; steps that really ran."""
INTERRUPTED = "interrupted"
"""Why a search ended (`SearchRecord.stopped`) that the user stopped: it is no answer to keep."""

Decision = str | int | float | bool


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One plan that a search looked at.

    Attributes:
        number: 0-based, in the order in which they were proposed.
        proposer: Who proposed its decisions: a planner's name for a seed, else the sampler's.
        decisions: Outer decision → value.
        state: ``kept``; ``pruned`` (a cheap figure told that it cannot win); ``infeasible`` (no
            plan, or more memory than there is); ``failed`` (an error).
        step_s: Fidelity → seconds of a step.
        peak_bytes: Most that a device would hold; 0 where that is not known.
        overfull: The most that a device would hold, as a multiple of what it may fill.
        devices: Devices in use.
        reason: Why it was pruned, infeasible or failed.
        words: The plan in one line; empty where there is none.
        seconds: What looking at it took, measurements included.
        measured_s: What of it were measurements.
        profile: Which stage was profiled alone and what that said, or why none was; empty where
            none was asked for.
    """

    number: int
    proposer: str
    decisions: dict[str, Decision]
    state: str
    step_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    overfull: float = 0.0
    devices: int = 0
    reason: str = ""
    words: str = ""
    seconds: float = 0.0
    measured_s: float = 0.0
    profile: str = ""

    @property
    def best_s(self) -> float | None:
        """The step time of the highest fidelity that was reached."""
        known = [self.step_s[name] for name in FIDELITIES if name in self.step_s]
        return known[-1] if known else None


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """A whole search.

    Attributes:
        planner: Who searched.
        sampler: Which Optuna sampler proposed; empty for planners without a study.
        seed: Its seed.
        trials: Everything that was looked at.
        winner: Number of the trial whose plan was chosen; -1 where there is none.
        seconds: Wall time.
        measured_s: Seconds of it spent on measurements.
        bound_s: No plan can be faster than this under the cost model; 0 where none is known.
        bound_parts: What the bound is made of, in seconds.
        importance: Decision → share of the spread of step times that it explains.
        stopped: Why the search ended.
        notes: What the user should know: a file that was set aside, a planner that failed.
        format: Number of this JSON form.
    """

    planner: str
    sampler: str
    seed: int
    trials: tuple[TrialRecord, ...]
    winner: int
    seconds: float
    measured_s: float = 0.0
    bound_s: float = 0.0
    bound_parts: dict[str, float] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    notes: tuple[str, ...] = ()
    format: int = RECORD_FORMAT

    @property
    def proposer(self) -> str:
        """Who proposed the winner; empty where there is none."""
        return next((t.proposer for t in self.trials if t.number == self.winner), "")

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal record."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    def _repr_html_(self) -> str:
        from raypar.search._record_html import search_html

        return search_html(self)

    @classmethod
    def from_json(cls, text: str) -> SearchRecord:
        """Reads what `to_json` wrote.

        Raises:
            PlanError: The text is something else, or of a newer format.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            found = raw.get("format")
            if not isinstance(found, int) or found > RECORD_FORMAT:
                raise PlanError(
                    f"the search record has format {found!r}, this raypar reads up to "
                    f"{RECORD_FORMAT}: upgrade raypar"
                )
            trials = tuple(TrialRecord(**t) for t in raw.pop("trials"))
            notes = tuple(raw.pop("notes"))
            return cls(trials=trials, notes=notes, **raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"this is no search record: {error}") from None
