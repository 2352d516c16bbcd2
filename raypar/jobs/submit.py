"""A run as a Ray job: submitted with what it needs, followed to its end."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar.errors import ClusterError, ConfigError

STOP_WAIT_S = 30
"""Seconds between SIGTERM and SIGKILL of a job that is stopped: time for a last checkpoint."""

_POLL_S = 0.5
_AGENT_S = 60.0
_NO_AGENT = "No available agent"
_REFUSALS = (ConnectionError, RuntimeError, ValueError, OSError)
_LOST_PACKAGE = "Failed to download runtime_env file package"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_IGNORED = (
    ".git",
    ".venv",
    "venv",
    "runs",
    "__pycache__",
    "*.pyc",
    ".pytest_cache",
    "build",
    "dist",
)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is submitted.

    Attributes:
        config_file: The run's YAML, in `working_dir`.
        overrides: ``key=value`` overrides.
        working_dir: Folder that is sent to the cluster: the config, and the modules it names.
        ship_raypar: Whether raypar itself is sent along, for nodes that lack it, or have another
            version; they still need its dependencies.
        pip: Packages that the cluster installs for the job.
        env_vars: Environment of the job.
        resume: Whether the run goes on from its newest checkpoint where it has one.
    """

    config_file: str
    overrides: Sequence[str] = ()
    working_dir: str | Path = "."
    ship_raypar: bool = False
    pip: Sequence[str] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False

    def entrypoint(self) -> str:
        """The shell command that the job runs."""
        config = Path(self.config_file)
        folder = Path(self.working_dir).resolve()
        inside = config.resolve()
        if not inside.is_relative_to(folder):
            raise ConfigError(
                f"the config {self.config_file!r} is not in the working directory {str(folder)!r}, "
                "which is all that the cluster gets: move it there, or set --working-dir to a "
                "folder that holds both"
            )
        words = ["python", "-m", "raypar.cli", "train", inside.relative_to(folder).as_posix()]
        for override in self.overrides:
            words += ["--set", override]
        if self.resume:
            words.append("--resume")
        return " ".join(shlex.quote(word) for word in words)

    def runtime_env(self) -> dict[str, Any]:
        """Ray's description of the job's environment."""
        env: dict[str, Any] = {
            "working_dir": str(self.working_dir),
            "excludes": list(_IGNORED),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **self.env_vars},
        }
        if self.ship_raypar:
            env["py_modules"] = [str(Path(__file__).resolve().parents[1])]
        if self.pip:
            env["pip"] = list(self.pip)
        return env


def submit(
    job: Submission,
    address: str | None = None,
    *,
    wait: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Submits a run as a Ray job, and follows it.

    Ctrl-C while following stops the job, which then writes a last checkpoint.

    Args:
        job: What to submit.
        address: Of the cluster's dashboard, such as ``http://head:8265``; default:
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS, as for ``ray job submit``.
        wait: Whether to stream the job's output until it ends.
        say: Is given the output.

    Returns:
        The exit code of ``raypar train`` (0 where it is not waited for).

    Raises:
        ConfigError: The config lies outside of the working directory.
        ClusterError: No job server at `address`; or it takes no job: it has no agent that would
            start one, or refuses this one.
    """
    from ray.job_submission import JobSubmissionClient

    entrypoint, env = job.entrypoint(), job.runtime_env()
    try:
        client = JobSubmissionClient(address)
    except _REFUSALS as error:
        raise ClusterError(
            f"no Ray job server at {address or 'the default address'}: {error}. Give --address "
            "http://HEAD:8265, the address of the cluster's dashboard (`ray start --head` with "
            "--include-dashboard=true prints it)"
        ) from None
    try:
        name = _submitted(client, entrypoint, env)
    except _REFUSALS as error:
        raise _not_taken(error, client.get_address()) from None
    say(f"job {name}: {entrypoint}")
    if not wait:
        return 0
    try:
        code = _follow(client, name, say)
        if code and _LOST_PACKAGE in str(client.get_job_info(name).message):
            # Ray dropped the files of an earlier job while this one counted on finding them.
            name = _submitted(client, entrypoint, env)
            say(f"job {name}: again, since Ray had dropped the working directory")
            code = _follow(client, name, say)
        return code
    except KeyboardInterrupt:
        say(f"stopping job {name}: it has {STOP_WAIT_S} s for a last checkpoint")
        client.stop_job(name)
        return _follow(client, name, say) or 130


def _not_taken(error: Exception, server: str) -> ClusterError:
    """What to tell of a job that a server did not take."""
    if _NO_AGENT not in str(error):
        return ClusterError(
            f"the Ray job server at {server} did not take the job: {str(error).strip()}. It is "
            "sent --working-dir (without .git, runs and the like), --pip and --env: a folder with "
            "less in it may be what it takes"
        )
    return ClusterError(
        f"the Ray job server at {server} is up, but no node's agent has taken the job for "
        f"{_AGENT_S:g} s. An agent runs beside the dashboard where ray[default] is installed (`pip "
        "install 'ray[default]'` on the head), and ends where its port is in use, as by a second "
        "Ray on that machine: start the head with `ray start --head --include-dashboard=true "
        "--dashboard-agent-listen-port=52366`; its log is dashboard_agent.log in Ray's session "
        "folder (/tmp/ray/session_latest/logs)"
    )


def _submitted(client: Any, entrypoint: str, env: dict[str, Any]) -> str:
    """Submits; a head that has just been started needs a moment until its agent takes jobs."""
    end = time.monotonic() + _AGENT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=env))
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > end:
                raise
        time.sleep(_POLL_S)


def _follow(client: Any, name: str, say: Callable[[str], None]) -> int:
    """Passes the job's output on until it ends, and returns its exit code."""
    shown = 0
    while str(client.get_job_status(name).value) not in _ENDED:
        shown += asyncio.run(_tail(client, name, shown, say))
        time.sleep(_POLL_S)
    rest = client.get_job_logs(name)[shown:].rstrip("\n")
    if rest:
        say(rest)
    info = client.get_job_info(name)
    say(f"job {name}: {str(info.status.value).lower()}")
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if str(info.status.value) == "SUCCEEDED":
        return 0
    if info.message:
        say(str(info.message))
    return 1


async def _tail(client: Any, name: str, shown: int, say: Callable[[str], None]) -> int:
    """Passes on what follows the first `shown` characters, while the connection lasts."""
    passed = seen = 0
    async for text in client.tail_job_logs(name):
        new = text[max(0, shown - seen) :]
        seen += len(text)
        if new:
            passed += len(new)
            say(new.rstrip("\n"))
    return passed
