"""What is looked at before a job is sent, and where it is sent: without Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raypar.config import load_config
from raypar.errors import ClusterError, ConfigError
from raypar.jobs.submit import Submission, check_kept, submit

CONFIG = """
model: {target: "mine:model"}
data: {target: "mine:data", global_batch: 8}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("env", [None, "http://of-the-environment:8265"])
def test_an_address_that_is_given_goes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, env: str | None
) -> None:
    """Ray's own client has it the other way round."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if env is not None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", env)
    monkeypatch.setenv("RAY_ADDRESS", "of-the-environment:6379")
    seen: list[str | None] = []

    class Client:
        def __init__(self, address: str | None) -> None:
            seen.append(os.environ.get("RAY_API_SERVER_ADDRESS"))
            raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    for address in ("http://given:8265", None):
        with pytest.raises(ClusterError, match="no Ray job server at"):
            submit(Submission(config_file="run.yaml"), address)
    assert seen == ["http://given:8265", env]
    assert os.environ.get("RAY_API_SERVER_ADDRESS") == env


def test_a_run_whose_files_go_with_the_job_is_told(config_file: Path) -> None:
    note = check_kept(load_config(config_file))
    assert note is not None
    assert "run.storage_path is 'runs', which lies in the job's own folder" in note
    named = ("run.name=gpt",)
    with pytest.raises(ConfigError, match="no checkpoint of an earlier job is there"):
        check_kept(load_config(config_file, named), resume=True)
    for kept in ("run.storage_path=/shared/runs", "checkpoint.storage=s3://bucket/gpt"):
        assert check_kept(load_config(config_file, (kept,))) is None
        assert check_kept(load_config(config_file, (*named, kept)), resume=True) is None
        with pytest.raises(ConfigError, match=r"run\.name, which is null"):
            check_kept(load_config(config_file, (kept,)), resume=True)
