"""A run as a Ray job: submitted with what it needs, followed to its end."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar.config import Config
from raypar.errors import ClusterError, ConfigError

STOP_WAIT_S = 30
"""Seconds between SIGTERM and SIGKILL of a job that is stopped: time for a last checkpoint."""

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_POLL_S = 0.5
_AGENT_S = 60.0
_PATIENCE_S = 30.0
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
        The exit code of ``raypar train``: 0 where it is not waited for, 130 where the job was
        stopped.

    Raises:
        ConfigError: The config lies outside of the working directory.
        ClusterError: No job server at `address`; or it takes no job: it has no agent that would
            start one, or refuses this one; or it does not answer any more.
    """
    from ray.job_submission import JobSubmissionClient

    entrypoint, env = job.entrypoint(), job.runtime_env()
    try:
        with _addressed(address):
            client = JobSubmissionClient(address)
    except _REFUSALS as error:
        raise ClusterError(
            f"no Ray job server at {address or 'the default address'}: {str(error).rstrip('.')}. "
            "Give --address the address of the cluster's dashboard, as http://10.0.0.1:8265 "
            "(`ray start --head --include-dashboard=true` prints it)"
        ) from None
    try:
        name = _submitted(client, entrypoint, env)
    except _REFUSALS as error:
        raise _not_taken(error, client.get_address()) from None
    say(f"job {name}: {entrypoint}")
    if not wait:
        return 0
    job_there = FollowedJob(client, name, say)
    try:
        code = job_there.follow()
        if code and _LOST_PACKAGE in job_there.message:
            # Ray dropped the files of an earlier job while this one counted on finding them.
            name = _submitted(client, entrypoint, env)
            say(f"job {name}: again, since Ray had dropped the working directory")
            job_there = FollowedJob(client, name, say)
            code = job_there.follow()
        return code
    except KeyboardInterrupt:
        say(f"stopping job {name}: it has {STOP_WAIT_S} s for a last checkpoint")
        job_there.stop()
        return job_there.follow()


@contextmanager
def _addressed(address: str | None) -> Iterator[None]:
    """Inside, Ray takes the address that it is given: it prefers that of the environment."""
    before = os.environ.get(_ADDRESS)
    if address is not None:
        os.environ[_ADDRESS] = address
    try:
        yield
    finally:
        if before is not None:
            os.environ[_ADDRESS] = before
        elif address is not None:
            del os.environ[_ADDRESS]


def check_kept(config: Config, *, resume: bool = False) -> str | None:
    """Looks whether what a job writes outlasts it.

    Returns:
        What its user should know, if it does not.

    Raises:
        ConfigError: The run is to go on from a checkpoint that no job could find.
    """
    run, checkpoints = config.run, config.checkpoint
    if resume and run.name is None:
        raise ConfigError(
            "--resume goes on in the folder of run.name, which is null: give it a name, for "
            "example --set run.name=gpt"
        )
    if Path(run.storage_path).is_absolute() or checkpoints.storage is not None:
        return None
    where = (
        f"run.storage_path is {run.storage_path!r}, which lies in the job's own folder, and Ray "
        "deletes that after the job"
    )
    keep = (
        "--set run.storage_path=/shared/runs, a folder of all nodes, or --set "
        "checkpoint.storage=s3://bucket/run"
    )
    if resume:
        raise ConfigError(
            f"--resume: {where}, so that no checkpoint of an earlier job is there: give {keep}"
        )
    return f"note: {where}, with its checkpoints; they are kept by {keep}"


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


class FollowedJob:
    """A job whose output is passed on.

    Args:
        client: Of the job server.
        name: The job.
        say: Is given the output.

    Attributes:
        message: What Ray says of how it ended.
    """

    def __init__(self, client: Any, name: str, say: Callable[[str], None]) -> None:
        self._client = client
        self._name = name
        self._say = say
        self._shown = 0  # characters of the output that were passed on
        self.message = ""

    def stop(self) -> None:
        """Has Ray end it: with SIGTERM, and `STOP_WAIT_S` later for good.

        Raises:
            ClusterError: The job server does not answer.
        """
        self._ask(self._client.stop_job)

    def follow(self) -> int:
        """Passes its output on until it ends.

        Returns:
            The exit code of what it ran; 130 where it was stopped.

        Raises:
            ClusterError: The job server does not answer any more.
        """
        while str(self._ask(self._client.get_job_status).value) not in _ENDED:
            asyncio.run(self._tail())
            time.sleep(_POLL_S)
        rest = self._ask(self._client.get_job_logs)[self._shown :].rstrip("\n")
        self._shown += len(rest)
        if rest:
            self._say(rest)
        info = self._ask(self._client.get_job_info)
        ended, self.message = str(info.status.value), str(info.message or "")
        self._say(f"job {self._name}: {ended.lower()}")
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        if ended == "SUCCEEDED":
            return 0
        if self.message:
            self._say(self.message)
        return 130 if ended == "STOPPED" else 1

    async def _tail(self) -> None:
        """Passes on what is new, while the connection lasts."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(self._name):
                new = text[max(0, self._shown - seen) :]
                seen += len(text)
                if new:
                    self._shown += len(new)
                    self._say(new.rstrip("\n"))
        except _broken():
            return  # an idle connection may be cut on its way; whether the server is there is asked

    def _ask(self, call: Callable[[str], Any]) -> Any:
        """What the job server answers; one that is slow or away for a moment is asked again."""
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return call(self._name)
            except _REFUSALS as error:
                if time.monotonic() >= end:
                    server = self._client.get_address()
                    raise ClusterError(
                        f"the Ray job server at {server} has not answered for {_PATIENCE_S:g} s: "
                        f"{str(error).strip()}. Job {self._name} may still run there: `ray job "
                        f"status {self._name} --address {server}` tells; if its cluster is gone, "
                        "submit it again with --resume"
                    ) from None
            time.sleep(_POLL_S)


def _broken() -> tuple[type[Exception], ...]:
    """What reading a job's output fails with where the connection breaks."""
    import aiohttp  # Ray's job client needs it

    return (*_REFUSALS, aiohttp.ClientError)
