"""What the documentation says about jobs, run against a head: RayJob and tutorial."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from raypar.cli import main
from tests.docs._pages import blocks_of, commands_of

pytest.importorskip("aiohttp", reason="the dashboard needs ray[default]")

ROOT = Path(__file__).resolve().parents[2]
_SMALL = (
    "model.kwargs={layers: 2, width: 32, heads: 2, seq_len: 16}",
    "data={target: 'examples.data:stdlib_bytes', global_batch: 8, kwargs: {seq_len: 16}}",
    "search={stages: 1, replicas: 1}",
    "checkpoint.every_steps=2",
)


def smaller(command: str, steps: int, workers: int) -> str:
    """A command with its own words, and settings that make the run a short one."""
    settings = (*_SMALL, f"train.steps={steps}", f"mesh.num_workers={workers}")
    keys = {setting.partition("=")[0] for setting in settings}
    words: list[str] = []
    for word in shlex.split(command):
        if words and words[-1] == "--set" and word.partition("=")[0] in keys:
            words.pop()  # a key is set once
        else:
            words.append(word)
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)


def submitted(client: Any, entrypoint: str, env: dict[str, Any]) -> str:
    """Submits once the head's agent is up, which takes a moment longer than its job server."""
    end = time.monotonic() + 60
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=env))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.5)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_entrypoint_of_the_rayjob_trains_on_a_head(head: str, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    spec = yaml.safe_load((ROOT / "examples/clusters/kuberay.yaml").read_text())["spec"]
    # The folders of the image and of the volume are elsewhere here.
    entrypoint = spec["entrypoint"].replace("/opt/raypar", str(ROOT))
    entrypoint = entrypoint.replace("/mnt/runs", str(tmp_path))
    client = JobSubmissionClient(head)
    # Actors of a job are those of `test_submit_ray`: here its own process trains.
    name = submitted(client, smaller(entrypoint, 4, 0), yaml.safe_load(spec["runtimeEnvYAML"]))
    end = time.monotonic() + 240
    while not client.get_job_status(name).is_terminal() and time.monotonic() < end:
        time.sleep(0.5)
    assert str(client.get_job_status(name).value) == "SUCCEEDED", client.get_job_logs(name)
    assert results(tmp_path / "gpt")["steps"] == 4
    assert len(list((tmp_path / "gpt" / "checkpoints").glob("*step-*"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_line_of_the_tutorial_submits_a_run(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = [
        command
        for block in blocks_of(ROOT / "docs" / "cluster_job.md")
        if block.kind == "bash" and not block.note
        for command in commands_of(block)
    ]
    (tmp_path / "examples").mkdir()
    for file in (ROOT / "examples").glob("*.*"):
        (tmp_path / "examples" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    # What is tried is the way there: the job trains in its own process.
    _, *words = shlex.split(smaller(os.path.expandvars(line), 3, 0))
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "step 3/3" in done.output
    assert results(tmp_path / "raypar-runs" / "demo")["steps"] == 3
