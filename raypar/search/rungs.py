"""A ladder as a value: one plan for each size of a cluster, looked up, written, read and shown."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypar._plan_text import duration, table
from raypar.errors import ConfigError, PlanError
from raypar.plan import Plan
from raypar.search.interop.contest import in_words

INDEX = "ladder.json"
_FORMAT = 1


@dataclass(frozen=True)
class Rung:
    """One size.

    Attributes:
        devices: Devices of the cluster.
        shape: The same per node.
        plan: The plan; None where there is none.
        reason: Why there is none, or why it is a smaller size's.
        carried_from: Size whose plan it is, some devices being idle; 0: it was found for this one.
        seconds: What finding it took.
    """

    devices: int
    shape: tuple[int, ...]
    plan: Plan | None
    reason: str = ""
    carried_from: int = 0
    seconds: float = 0.0

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step; infinite where no plan or prediction is there."""
        return self.plan.predicted.get("step_s", math.inf) if self.plan else math.inf

    @property
    def samples_per_s(self) -> float:
        """Predicted throughput; 0 where none is known."""
        return self.plan.global_batch / self.step_s if self.plan else 0.0


@dataclass(frozen=True)
class Ladder:
    """Plans by size of the cluster.

    Attributes:
        rungs: One for every size, ascending.
        seconds: What making them took.
        stopped: Why sizes are missing, or ``""``.
    """

    rungs: tuple[Rung, ...]
    seconds: float = 0.0
    stopped: str = ""

    def best_for(self, devices: int) -> Plan:
        """The plan to go on with where `devices` devices are left: the largest that fits.

        Its `Plan.cluster` says how many devices of which node it wants, see `Cluster.take`.

        Raises:
            PlanError: All plans need more devices.
        """
        fitting = [r.plan for r in self.rungs if r.devices <= devices and r.plan is not None]
        if fitting:
            return fitting[-1]
        sizes = [r.devices for r in self.rungs if r.plan is not None]
        known = f"the smallest plan is for {sizes[0]} devices" if sizes else "it has no plan"
        raise PlanError(
            f"the ladder has no plan for {devices} devices or fewer: {known}; make one with "
            f"raypar plan CONFIG --ladder {max(devices, 1)}"
        )

    def save(self, folder: str | Path) -> Path:
        """Writes ``plan-N.json`` for every size and the index ``ladder.json``; returns the latter.

        Raises:
            ConfigError: The folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = []
            for rung in self.rungs:
                if rung.plan is not None:
                    rung.plan.save(folder / _file(rung))
                entries.append(_entry(rung))
            index = {
                "format": _FORMAT,
                "seconds": self.seconds,
                "stopped": self.stopped,
                "sizes": entries,
            }
            text = json.dumps(index, indent=1, allow_nan=False)
            (folder / INDEX).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write the ladder to {str(folder)!r}: {error.strerror or error}; name "
                "another folder with --output"
            ) from None
        return folder / INDEX

    @classmethod
    def load(cls, folder: str | Path) -> Ladder:
        """Reads what `save` wrote.

        Raises:
            PlanError: There is no ladder, or one of its files is missing or wrong.
        """
        path = Path(folder) / INDEX
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}, expected {_FORMAT}")
            rungs = tuple(_rung(entry, Path(folder)) for entry in raw["sizes"])
            return cls(rungs, float(raw["seconds"]), str(raw["stopped"]))
        except OSError as error:
            raise PlanError(f"cannot read ladder {str(path)!r}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"{str(path)!r} is no ladder: {error}") from None

    def text(self) -> str:
        """A table of the sizes, then what could not be planned."""
        made = [rung for rung in self.rungs if rung.plan is not None]
        lines: list[str] = []
        if made:
            first = made[0]

            def efficiency(rung: Rung) -> str:
                if not first.samples_per_s:
                    return ""
                share = rung.samples_per_s * first.devices / (first.samples_per_s * rung.devices)
                return f"{share:.0%}"

            columns = [
                ("devices", [str(r.devices) for r in made]),
                ("step", [duration(r.step_s) if r.step_s < math.inf else "" for r in made]),
                ("samples/s", [f"{r.samples_per_s:,.0f}" for r in made]),
                ("efficiency", [efficiency(r) for r in made]),
                ("plan", [_words(r) for r in made]),
            ]
            lines += table(columns)
        lines += [f"{r.devices} devices: no plan: {r.reason}" for r in self.rungs if not r.plan]
        if self.stopped:
            lines.append(self.stopped)
        return "\n".join(lines)


def _file(rung: Rung) -> str:
    return f"plan-{rung.devices}.json"


def _words(rung: Rung) -> str:
    assert rung.plan is not None
    text = in_words(rung.plan)
    return f"{text} (that for {rung.carried_from} devices)" if rung.carried_from else text


def _entry(rung: Rung) -> dict[str, Any]:
    """A rung as the index holds it; figures are null where they are not known."""
    known = rung.step_s < math.inf
    return {
        "devices": rung.devices,
        "shape": list(rung.shape),
        "file": _file(rung) if rung.plan else None,
        "step_s": rung.step_s if known else None,
        "samples_per_s": rung.samples_per_s if known else None,
        "certificate": rung.plan.certificate if rung.plan else {},
        "plan": _words(rung) if rung.plan else None,
        "reason": rung.reason,
        "carried_from": rung.carried_from,
        "seconds": rung.seconds,
    }


def _rung(entry: dict[str, Any], folder: Path) -> Rung:
    return Rung(
        int(entry["devices"]),
        tuple(entry["shape"]),
        None if entry["file"] is None else Plan.load(folder / entry["file"]),
        str(entry["reason"]),
        int(entry["carried_from"]),
        float(entry["seconds"]),
    )
