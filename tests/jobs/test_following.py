"""A job that is followed, by a client that answers as it is told to: without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raypar.errors import ClusterError
from raypar.jobs import submit as submit_module
from raypar.jobs.submit import Submission, submit

pytest.importorskip("aiohttp", reason="the dashboard needs ray[default]")

LINES = [f"step {i}\n" for i in range(6)]


class Server:
    """Its job has written all of `LINES` once its output has been read three times.

    Args:
        after: Called at each reading, once two more lines have been passed on.
        ended: How the job ends.
    """

    def __init__(self, after: Callable[[int], None], ended: str = "SUCCEEDED") -> None:
        self._after = after
        self._ended = ended
        self.readings = 0
        self.asked: list[str] = []
        self.away: Exception | None = None

    def submit_job(self, **_: Any) -> str:
        return "job-1"

    def get_address(self) -> str:
        return "http://head:8265"

    def stop_job(self, _: str) -> None:
        self._answer("stop")

    def get_job_status(self, _: str) -> Any:
        self._answer("status")
        return SimpleNamespace(value="RUNNING" if self.readings < 3 else self._ended)

    def get_job_logs(self, _: str) -> str:
        return "".join(LINES)

    def get_job_info(self, name: str) -> Any:
        status = self.get_job_status(name)
        return SimpleNamespace(status=status, message="", driver_exit_code=None)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self.readings += 1
        for line in LINES[: 2 * self.readings]:
            yield line
        self._after(self.readings)

    def _answer(self, call: str) -> None:
        self.asked.append(call)
        if self.away is not None:
            raise self.away


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], tuple[int, list[str]]]:
    monkeypatch.setattr(submit_module, "_POLL_S", 0.0)
    monkeypatch.setattr(submit_module, "_PATIENCE_S", 0.0)

    def run(server: Server) -> tuple[int, list[str]]:
        monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda _: server)
        said: list[str] = []
        code = submit(Submission(config_file="run.yaml"), say=said.append)
        return code, [line for text in said for line in text.splitlines() if "step" in line]

    return run


ALL = [line.strip() for line in LINES]


def test_a_connection_that_breaks_is_taken_up_where_it_was(
    follow: Callable[[Server], tuple[int, list[str]]],
) -> None:
    def breaks(_: int) -> None:
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    assert follow(Server(breaks)) == (0, ALL)


def test_a_stop_says_nothing_twice_and_ends_with_the_code_of_one(
    follow: Callable[[Server], tuple[int, list[str]]],
) -> None:
    def interrupts(reading: int) -> None:
        if reading == 2:
            raise KeyboardInterrupt

    server = Server(interrupts, ended="STOPPED")
    assert follow(server) == (130, ALL)
    assert server.asked.count("stop") == 1


@pytest.mark.parametrize("away", [ConnectionError("Failed to connect"), RuntimeError("500")])
def test_a_server_that_is_gone_is_told_with_what_to_do(
    follow: Callable[[Server], tuple[int, list[str]]], away: Exception
) -> None:
    def goes(_: int) -> None:
        server.away = away

    server = Server(goes)
    with pytest.raises(ClusterError) as caught:
        follow(server)
    for text in ("http://head:8265 has not answered", str(away), "ray job status job-1"):
        assert text in str(caught.value)
