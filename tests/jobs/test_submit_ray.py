"""Runs as Ray jobs: output, exit codes, a stop in the middle, and going on after it."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from raypar.errors import ClusterError, ConfigError
from raypar.jobs import submit as submit_module
from raypar.jobs.submit import Submission, submit

pytest.importorskip("aiohttp", reason="the dashboard needs ray[default]")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a model, data that take their time, and a config."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import time
            import torch

            def model():
                return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(),
                                           torch.nn.Linear(8, 2))

            def data(global_batch, pause=0.0):
                def batches():
                    g = torch.Generator().manual_seed(0)
                    while True:
                        time.sleep(pause)
                        x = torch.randn(global_batch, 4, generator=g)
                        yield x, (x.sum(1) > 0).long()
                return batches()
            """
        )
    )
    (tmp_path / "run.yaml").write_text(
        textwrap.dedent(
            f"""
            model: {{target: "mine:model", loss: "torch.nn.functional:cross_entropy"}}
            data: {{target: "mine:data", global_batch: 8}}
            mesh: {{num_workers: 1}}
            search: {{stages: 1}}
            train: {{steps: 6, microbatches: 2}}
            run: {{name: job, storage_path: {tmp_path / "runs"}, log_every: 1}}
            """
        )
    )
    return tmp_path


def result_of(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / "runs" / "job" / "result.json").read_text())
    return found


def running(client: Any) -> list[str]:
    """Submitted jobs that run; drivers that connected by themselves are jobs, too."""
    found = [j for j in client.list_jobs() if j.submission_id is not None]
    return [j.submission_id for j in found if str(j.status.value) == "RUNNING"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_streams_its_output_ends_with_its_code_and_goes_on_after_a_stop(
    head: str, project: Path
) -> None:
    env = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    wanted: dict[str, Any] = {"working_dir": project, "env_vars": env}
    config = str(project / "run.yaml")
    heard: list[str] = []

    slow = Submission(
        config_file=config, overrides=["train.steps=100000", "data.kwargs={pause: 0.02}"], **wanted
    )
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(submit(slow, head, say=heard.append)))
    thread.start()
    metrics = project / "runs" / "job" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert thread.is_alive(), heard
        assert time.monotonic() < end, heard
        time.sleep(0.2)
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head)
    [job] = running(client)
    client.stop_job(job)
    thread.join(90)
    assert not thread.is_alive()
    assert codes != [0]
    assert any("stopping after this step, with a checkpoint" in text for text in heard), heard
    saved = sorted((project / "runs" / "job" / "checkpoints").iterdir())
    assert len(saved) == 1, saved

    reached = json.loads(metrics.read_text().splitlines()[-1])["step"] + 1
    again = Submission(
        config_file=config,
        # Without actors, to which it is the same checkpoint.
        overrides=[f"train.steps={reached + 3}", "mesh.num_workers=0"],
        resume=True,
        **wanted,
    )
    heard.clear()
    assert submit(again, head, say=heard.append) == 0, heard
    assert any(f"step {reached + 3}/{reached + 3}" in text for text in heard), heard
    assert result_of(project)["steps"] == 3
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(reached + 3)
    )

    broken = Submission(config_file=config, overrides=["train.stepz=3"], **wanted)
    heard.clear()
    assert submit(broken, head, say=heard.append) == 2
    assert any("Did you mean 'train.steps'" in text for text in heard), heard
    assert running(client) == []


def test_a_config_outside_of_the_working_directory_is_refused(project: Path) -> None:
    job = Submission(config_file="/etc/hosts", working_dir=project)
    with pytest.raises(ConfigError, match="not in the working directory"):
        submit(job, "http://127.0.0.1:1")


def test_an_address_without_a_job_server_is_told(project: Path) -> None:
    assert ray  # the client comes with it
    job = Submission(config_file=str(project / "run.yaml"), working_dir=project)
    with pytest.raises(ClusterError, match=r"no Ray job server at http://127\.0\.0\.1:1"):
        submit(job, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (
            RuntimeError("Request failed with status code 500: No available agent to submit job."),
            r"at http://head:8265 is up, but no node's agent.*--dashboard-agent-listen-port=52366",
        ),
        (
            ValueError("Package size exceeds the maximum size of 512 MiB"),
            r"at http://head:8265 did not take the job: Package size.*--working-dir",
        ),
    ],
)
def test_a_server_that_takes_no_job_is_not_told_to_be_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception, told: str
) -> None:
    class Server:
        def __init__(self, address: str | None) -> None:
            pass

        def get_address(self) -> str:
            return "http://head:8265"

        def submit_job(self, **_: Any) -> str:
            raise refusal

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Server)
    monkeypatch.setattr(submit_module, "_AGENT_S", 0.0)
    job = Submission(config_file=str(project / "run.yaml"), working_dir=project)
    with pytest.raises(ClusterError, match=told) as caught:
        submit(job)
    assert "no Ray job server" not in str(caught.value)
