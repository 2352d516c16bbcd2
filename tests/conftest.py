"""What every test shares: quiet threads, a hypothesis profile, and one Ray session."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests._tiers import examples

_ROOT = Path(__file__).resolve().parent.parent
# Ray reads these in this process and in every one that it starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 (Ray's own spelling)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers make way for others by default: beside a busy neighbour they would hardly run.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ.pop("RAY_ADDRESS", None)
# What somebody measured on this machine is nobody else's test.
os.environ["RAYPAR_CACHE_DIR"] = tempfile.mkdtemp(prefix="raypar-tests-")
atexit.register(shutil.rmtree, os.environ["RAYPAR_CACHE_DIR"], ignore_errors=True)

if threading.current_thread() is threading.main_thread():
    # A shell that starts the tests in the background has them ignore Ctrl-C, which some send.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray Tune would leave its own handler of Ctrl-C to the tests that come after a sweep.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

settings.register_profile(
    "raypar",
    max_examples=examples(30, 100),
    deadline=None,  # the machine is shared: no test asserts a time
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("raypar")


_SHARED_RAY = contextlib.ExitStack()


# First of all, since pytest-xdist reads the groups in a hook of this name; the order comes last.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    for item in items:
        needs_ray = _shares_ray(item)
        if needs_ray:
            item.add_marker(pytest.mark.ray)
            if item.get_closest_marker("timeout") is None:
                # Ranks begin with seconds of imports, which are minutes on a machine with others.
                item.add_marker(pytest.mark.timeout(300))
        # With several workers, one has all that shares the session's Ray; what starts another one
        # stays with its folder, which may share it; other files stay whole, since their tests share
        # what was captured.
        own_ray = item.path.stem.endswith("_ray")
        group = "ray" if needs_ray else str(item.path.parent if own_ray else item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    yield
    # The longest group comes first, so that nobody waits for it at the end, and stays together.
    items.sort(key=lambda item: not _shares_ray(item))


@pytest.hookimpl(trylast=True)  # when the test's own fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The shared Ray ends with the last test that uses it: it would only burden what follows."""
    if _shares_ray(item) and not (nextitem and _shares_ray(nextitem)):
        _SHARED_RAY.close()


def _shares_ray(item: pytest.Item) -> bool:
    return "ray_session" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """The address of one local Ray with 16 CPUs for all tests that ask for it."""
    yield _SHARED_RAY.enter_context(_one_ray())
    _SHARED_RAY.close()  # where it is still there: the tests were interrupted


@contextlib.contextmanager
def _one_ray() -> Iterator[str]:
    """A local Ray; yields its address.

    Its workers have the project's root on their path, so that functions and actors defined in
    test modules can be shipped. At the end nothing may be left: no placement group, and no process
    of this session.
    """
    import ray

    # AF_UNIX paths are limited to about 100 bytes: pytest's tmp_path is too long for Ray.
    folder = Path(tempfile.mkdtemp(prefix="rp-", dir="/tmp"))
    python_path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), python_path]))
    context = ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _temp_dir=str(folder),
    )
    try:
        yield context.address_info["gcs_address"]
        groups = _held_groups()
    finally:
        ray.shutdown()
        if python_path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = python_path
        left = _processes_left(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
    assert not groups, f"placement groups were left behind: {groups}"
    assert not left, f"Ray processes were left behind: {left}"


def _held_groups() -> list[str]:
    from ray.util.placement_group import placement_group_table

    return [
        entry["name"] or identity
        for identity, entry in placement_group_table().items()
        if entry["state"] != "REMOVED"
    ]


def _processes_left(folder: str, patience_s: float = 15.0) -> list[str]:
    """Command lines of processes that still work in `folder`, after giving them time to end."""
    end = time.monotonic() + patience_s
    while True:
        listing = subprocess.run(
            ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=False
        ).stdout
        left = [line for line in listing.splitlines() if folder in line]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


if sys.platform == "darwin":  # macOS forks badly with threads; Ray's own advice
    os.environ.setdefault("OBJC_DISABLE_INITIALIZE_FORK_SAFETY", "YES")
