"""Reads thousands of damaged plans, configs, checkpoints and messages: clear errors, nothing else.

    python -m release.fuzz --inputs 10000 --state fuzz.json

Rounds are seeded by their number, and what is done is kept in the state file: started again, it
goes on where it stopped. A find is shrunk, printed, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from raypar.errors import RayparError
from release._fuzz_targets import TARGETS, Tally, Target

_ROUND = 500
_SLOW_S = 3.0
"""Of the processor: others that work on this machine are no find."""
_STUCK_S = 60.0
"""By the clock, for what waits instead."""
_GROWTH_MIB = 200.0
_LONGEST_ERROR = 20_000


def fuzz_round(target: Target, number: int, count: int, tally: Tally) -> None:
    """Reads `count` inputs of a round.

    Raises:
        Exception: A find, after it was shrunk.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inputs = target.inputs()
    left = count

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(inputs)
    def read(given_input: Any) -> None:
        nonlocal left
        began, worked = time.perf_counter(), time.process_time()
        accepted, said = False, ""
        try:
            accepted = target.accepts(given_input)
        except RayparError as error:
            said = str(error)
        assert len(said) < _LONGEST_ERROR, f"an error of {len(said)} characters"
        took, waited = time.process_time() - worked, time.perf_counter() - began
        assert took < _SLOW_S, f"one input took {took:.1f} s of the processor"
        assert waited < _STUCK_S, f"one input took {waited:.1f} s"
        if left:
            left -= 1
            tally.inputs += 1
            tally.accepted += accepted
            tally.refused += not accepted
            tally.slowest_s = max(tally.slowest_s, took)

    read()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tally.grown_mib = max(tally.grown_mib, grown)
    assert grown < _GROWTH_MIB or number == 0, f"{count} inputs grew the process by {grown:.0f} MiB"


def load_state(path: Path | None) -> dict[str, Tally]:
    """Tallies of earlier runs; none where there is no file."""
    if path is None or not path.exists():
        return {}
    raw = json.loads(path.read_text(encoding="utf-8"))
    return {name: Tally(**row) for name, row in raw.items() if name in TARGETS}


def table(tallies: dict[str, Tally]) -> str:
    """The counts, one target a line."""
    lines = [
        f"{'target':<12} {'inputs':>8} {'refused':>8} {'accepted':>8} {'slowest':>9} {'grown':>9}"
    ]
    for name, t in tallies.items():
        lines.append(
            f"{name:<12} {t.inputs:>8,} {t.refused:>8,} {t.accepted:>8,} {t.slowest_s:>7.2f} s "
            f"{t.grown_mib:>5.0f} MiB"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of every target")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--state", type=Path, help="JSON file from which to go on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with _quiet():
        tallies, failed = fuzz(options)
    print(table(tallies))
    return int(failed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of raypar: damaged inputs make it write thousands."""
    log = logging.getLogger("raypar")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def fuzz(options: argparse.Namespace) -> tuple[dict[str, Tally], bool]:
    """Goes through the inputs; the tallies, and whether something was found."""
    tallies = load_state(options.state)
    names = list(TARGETS) if options.target == "all" else [options.target]
    failed = False
    for name in names:
        tally = tallies.setdefault(name, Tally())
        while tally.inputs < options.inputs:
            before, kept = tally.inputs, dataclasses.replace(tally)
            try:
                count = min(_ROUND, options.inputs - before)
                fuzz_round(TARGETS[name], before // _ROUND, count, tally)
            except Exception:
                traceback.print_exc()
                print(f"{name}: found something in round {before // _ROUND}", file=sys.stderr)
                tallies[name] = kept  # the round is run again next time
                failed = True
                break
            if options.state is not None:
                plain = {key: t.plain() for key, t in tallies.items()}
                options.state.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
            if tally.inputs == before:  # the strategy has no more different inputs
                break
    return tallies, failed


if __name__ == "__main__":
    sys.exit(main())
