"""What the GPU scripts share: options, the machine in figures, results, clocks, ranks in processes.

Imports torch and raypar only inside functions, so that the name check can be run where raypar
cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RANK_DEADLINE_S = 240.0
"""Longest that one case of ranks may take, in seconds."""


class Target(NamedTuple):
    """A figure that has a bound.

    Attributes:
        name: What is bounded.
        value: What was found.
        bound: ``<= 0.5``, ``>= 0.9`` or ``== 0``.
    """

    name: str
    value: float
    bound: str

    @property
    def met(self) -> bool:
        """Whether the value keeps the bound."""
        sign, _, limit = self.bound.partition(" ")
        number = float(limit)
        if sign == "<=":
            return self.value <= number
        return self.value >= number if sign == ">=" else self.value == number


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that every part has."""
    found = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script itself")
    found.add_argument("--out", type=Path, help="folder for the part's JSON file")
    return found


def machine(device: str) -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory": total,
            "memory_free": free,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "nccl": _nccl(),
        }
    return found


def _commit() -> str:
    try:
        text = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


def _driver() -> str:
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.split()[0]


def _nccl() -> int:
    try:
        from cupy.cuda import nccl
    except ImportError:
        return 0
    return int(nccl.get_version())


def write(
    options: argparse.Namespace,
    part: str,
    figures: dict[str, Any],
    targets: Sequence[Target] = (),
) -> int:
    """Prints the targets, writes the part's file, and returns the exit code.

    In a smoke run a missed target does not fail the part: its figures mean nothing.
    """
    missed = [t for t in targets if not t.met]
    for target in targets:
        mark = "met" if target.met else "MISSED"
        print(f"{part}: {target.name} = {target.value:.6g}, target {target.bound}: {mark}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {
                "part": part,
                "smoke": options.smoke,
                "machine": machine(options.device),
                "targets": [{**t._asdict(), "met": t.met} for t in targets],
                "figures": figures,
            },
            indent=1,
        )
        name = part.replace(" ", "_").replace("/", "_") + ".json"
        # A part that is killed while it writes leaves the file of before.
        half = options.out / (name + ".half")
        half.write_text(text + "\n")
        half.replace(options.out / name)
    return int(bool(missed) and not options.smoke)


class Budget:
    """What is left of a part's time, so that it can write what it has before it is ended.

    Args:
        seconds: For the whole part.
    """

    def __init__(self, seconds: float = 540.0) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())


# -- clocks ---------------------------------------------------------------------------------


def settle(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def step_times(step: Callable[[int], Any], device: str, warm_up: int, steps: int) -> list[float]:
    """Seconds of every step after the warm-up; each is waited for, as a loop that logs does."""
    for index in range(warm_up):
        step(index)
    settle(device)
    found = []
    for index in range(warm_up, warm_up + steps):
        began = time.perf_counter()
        step(index)
        settle(device)
        found.append(time.perf_counter() - began)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of some figures."""
    ordered = sorted(values)
    n = len(ordered)
    return {
        "median": statistics.median(ordered),
        "low": ordered[n // 4],
        "high": ordered[(3 * n) // 4 if n > 1 else 0],
        "n": n,
    }


# -- ranks ----------------------------------------------------------------------------------

Case = Callable[..., Any]


class Ranks:
    """Processes that are ranks of one group after the other; on CUDA all share the first GPU.

    Args:
        size: Most ranks that a case will have.
        device: ``cuda`` (NCCL) or ``cpu`` (sockets).
    """

    def __init__(self, size: int, device: str) -> None:
        from raypar.comm.rendezvous import Rendezvous

        self._context = multiprocessing.get_context("spawn")
        self._device = device
        self._meeting = Rendezvous()
        self._count = 0
        self._workers: dict[int, tuple[Any, Connection]] = {}
        for rank in range(size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._device), daemon=True)
        process.start()
        theirs.close()
        self._workers[rank] = (process, mine)

    def run(self, case: Case, size: int, timeout_s: float = 20.0) -> list[Any]:
        """What ``case(group)`` returns on every rank of a new group; raises if one raised."""
        self._count += 1
        name = f"world {self._count}"
        for rank in range(size):
            if not self._workers[rank][0].is_alive():
                self._start(rank)
            task = (case, name, rank, size, self._meeting.address, timeout_s)
            self._workers[rank][1].send(task)
        results: list[Any] = []
        problems: list[str] = []
        end = time.monotonic() + RANK_DEADLINE_S
        for rank in range(size):
            process, pipe = self._workers[rank]
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    process.kill()
                    raise EOFError(f"no answer within {RANK_DEADLINE_S:g} s: the rank was ended")
                right, value = pipe.recv()
            except EOFError as error:
                process.join(10)
                right, value = False, f"exit code {process.exitcode} {error}"
            results.append(value)
            if not right:
                problems.append(f"rank {rank} of {size}: {value}")
        if problems:
            raise RuntimeError("\n".join(problems))
        return results

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._workers.values():
            if process.is_alive():
                pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
        self._meeting.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, device: str) -> None:
    import torch

    from raypar.comm.registry import backend_for, get_backend

    torch.set_num_threads(1)
    backend: Any = get_backend(backend_for(device))
    if device == "cuda":
        torch.cuda.set_device(0)
    while (task := pipe.recv()) is not None:
        case, name, rank, size, address, timeout_s = task
        group = None
        try:
            group = backend.create(name, rank, size, address, timeout_s=60.0)
            group.timeout_s = timeout_s
            pipe.send((True, case(group)))
        except BaseException as error:
            pipe.send((False, traceback.format_exc()))
            if group is not None:
                group.abort(f"a rank failed: {error}")
            if not isinstance(error, Exception):
                os._exit(0)
        if group is not None:
            group.close()


def here() -> None:
    """Puts the project's root on the path, for scripts that are started by path."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
