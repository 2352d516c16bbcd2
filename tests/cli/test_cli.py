"""The command line as a user meets it; planning runs for real, training is told to tests/train."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

import raypar
from raypar.cli import main
from raypar.config import STUDY_KEYS, load_config
from raypar.errors import TrainingError

SMALL = """
model: {target: "examples.models:gpt", kwargs: {layers: 2, width: 16, heads: 2, seq_len: 8}}
data: {target: "examples.data:stdlib_bytes", global_batch: 8, kwargs: {seq_len: 8}}
mesh: {num_workers: 2}
search: {stages: 2}
train: {steps: 2, microbatches: 2}
run: {name: small, storage_path: STORAGE, log_every: 1}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALL.replace("STORAGE", str(tmp_path / "runs")))
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_version_and_help() -> None:
    assert run("--version").output.strip().endswith(raypar.__version__)
    text = run("--help").output
    for group in ((), ("config",), ("checkpoint",)):  # what a command does is not cut off
        assert "..." not in run(*group, "--help").output.partition("Commands:")[2]
    for command in ("config", "doctor", "explain", "plan", "train"):
        assert re.search(rf"^  {command} ", text, re.M), text


def test_help_and_config_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from raypar.cli import main\n"
        "for args in (['--help'], ['config'], ['train', '--help']):\n"
        "    assert CliRunner().invoke(main, args).exit_code == 0\n"
        "print(sorted({'torch', 'ray', 'numpy', 'networkx'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_prints_a_config_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "printed.yaml"
    path.write_text(run("config").stdout)
    assert load_config(path).search.planner == "auto"


def test_a_config_error_is_one_block_and_exit_code_2(config_file: Path) -> None:
    done = run("train", config_file, "--set", "train.step=3")
    assert done.exit_code == 2
    assert "Did you mean 'train.steps'?" in done.stderr
    assert "Traceback" not in done.output


def test_a_missing_file_is_exit_code_2(tmp_path: Path) -> None:
    done = run("plan", tmp_path / "none.yaml")
    assert done.exit_code == 2
    assert "No such file" in done.stderr


def test_an_unknown_command_is_refused() -> None:
    assert run("trian").exit_code == 2


@pytest.mark.parametrize(
    ("section", "takes"),
    [("model", "layers=4"), ("data", "seq_len=128"), ("optimizer", "weight_decay")],
)
def test_a_wrong_kwarg_names_its_key_and_what_is_taken(
    config_file: Path, section: str, takes: str
) -> None:
    done = run("train", config_file, "--num-workers", 0, "--set", f"{section}.kwargs.depth=3")
    assert done.exit_code == 2
    assert f"{section}.kwargs: " in done.stderr
    assert "unexpected keyword argument 'depth'" in done.stderr
    assert takes in done.stderr


def test_a_misspelt_argument_of_the_model_is_recognised(config_file: Path) -> None:
    done = run("config", "check", config_file, "--set", "model.kwargs.widht=8")
    assert done.exit_code == 2
    assert "Did you mean 'width'? It takes " in done.stderr


def test_global_batch_is_said_once(config_file: Path) -> None:
    done = run("plan", config_file, "--set", "data.kwargs.global_batch=3")
    assert done.exit_code == 2
    assert "say it once, as data.global_batch" in done.stderr


def test_double_precision_reaches_parameters_and_inputs(config_file: Path, tmp_path: Path) -> None:
    done = run("train", config_file, "--num-workers", 0, "--set", "model.precision=fp64")
    assert done.exit_code == 0, done.output
    import torch

    from raypar.train.trainer import checkpoint_at

    found = checkpoint_at(tmp_path / "runs" / "small", tmp_path)
    assert found is not None
    state = found.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float64}


def test_a_run_that_fails_is_exit_code_1(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raypar._launch

    def fail(config: object, **_: object) -> None:
        raise TrainingError("stage 1 rank 0 raised [red]brackets[/red] and all")

    monkeypatch.setattr(raypar._launch, "train_config", fail)
    done = run("train", config_file)
    assert done.exit_code == 1
    assert "TrainingError: stage 1 rank 0 raised [red]brackets[/red] and all" in done.stderr


def test_ctrl_c_is_exit_code_130(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import raypar._launch

    def interrupt(config: object, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(raypar._launch, "train_config", interrupt)
    done = run("train", config_file)
    assert done.exit_code == 130
    assert "Traceback" not in done.output


def test_num_workers_is_the_same_as_its_key(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raypar._launch

    seen = []

    def look(config: object, **_: object) -> None:
        seen.append(config)
        raise TrainingError("enough")

    monkeypatch.setattr(raypar._launch, "train_config", look)
    run("train", config_file, "--num-workers", 0)
    run("train", config_file, "--set", "mesh.num_workers=0")
    assert seen[0] == seen[1]
    assert seen[0].mesh.num_workers == 0


def test_plan_writes_what_explain_explains(config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    planned = run("plan", config_file, "-o", output)
    assert planned.exit_code == 0, planned.output
    made = raypar.Plan.load(output)
    assert len(made.stages) == 2
    assert made.microbatches == 2
    explained = run("explain", output)
    assert explained.exit_code == 0, explained.output
    assert made.schedule.name in explained.stdout
    from_config = run("explain", config_file)
    assert from_config.exit_code == 0, from_config.output


def test_explain_of_a_broken_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    done = run("explain", path)
    assert done.exit_code == 1
    assert "not valid JSON" in done.stderr


def test_explain_of_a_plan_takes_no_config_options(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    done = run("explain", path, "--set", "train.steps=3")
    assert done.exit_code == 2
    assert "--set and --cluster go with a config" in done.stderr


def test_train_in_one_process_leaves_a_run_that_can_be_repeated(
    config_file: Path, tmp_path: Path
) -> None:
    done = run("train", config_file, "--num-workers", 0)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "small"
    assert f"files: {folder}" in done.stdout
    assert re.search(r"^step 2/2 .*loss \d", done.stdout, re.M)
    resolved = folder / "config.resolved.yaml"
    left = {
        line.split(":")[0].strip() for line in resolved.read_text().splitlines() if "auto" in line
    }
    assert left <= {*STUDY_KEYS, "cost_model"}  # no plan is searched for again
    again = run("train", resolved, "--set", "run.name=again")
    assert again.exit_code == 0, again.output
    first, second = (
        raypar.Plan.load(tmp_path / "runs" / name / "plan.json") for name in ("small", "again")
    )
    assert first.diff(second) == []


def test_what_a_search_found_is_repeated_from_the_plan_file(
    config_file: Path, tmp_path: Path
) -> None:
    searched = ("--set", "search.planner=alpa", "--set", "model.kwargs.layers=1")
    done = run("train", config_file, "--num-workers", 0, *searched)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "small"
    resolved = load_config(folder / "config.resolved.yaml")
    assert resolved.search.planner == "manual"
    assert resolved.search.manual == str(folder / "plan.json")
    first = raypar.Plan.load(folder / "plan.json")
    assert first.planner == "alpa"
    again = run("train", folder / "config.resolved.yaml", "--set", "run.name=again")
    assert again.exit_code == 0, again.output
    assert raypar.Plan.load(tmp_path / "runs" / "again" / "plan.json") == first


@pytest.mark.parametrize("once", [True, False], ids=["iterator", "list"])
def test_configured_data_lose_no_batch_to_the_look_at_the_first(once: bool) -> None:
    from raypar._builders import BuildData
    from raypar.train.data import peek

    values = [torch.full((2,), float(i)) for i in range(3)]
    data = BuildData(lambda: iter(values) if once else values, {}, torch.float64)
    opened = peek(data, seed=0)
    assert opened.one_shot == once
    assert [float(batch[0]) for batch in opened.batches] == [0.0, 1.0, 2.0]
    assert opened.example.dtype == torch.float64


def test_verify_runs_the_plan_beside_the_unsplit_model(config_file: Path) -> None:
    done = run("verify", config_file, "--set", "search.stages=2", "--set", "search.planner=uniform")
    assert done.exit_code == 0, done.output
    assert "no value differs in 1 step" in done.stdout


def test_a_config_is_shown_checked_and_described(config_file: Path, tmp_path: Path) -> None:
    shown = run("config", "show", config_file)
    assert shown.exit_code == 0
    assert "clip_norm: null" in shown.stdout
    assert run("config", "check", config_file).exit_code == 0
    wrong = run("config", "check", config_file, "--set", "model.target=examples.models:gtp")
    assert wrong.exit_code == 2
    assert "Did you mean 'gpt'" in wrong.stderr
    schema = tmp_path / "schema.json"
    assert run("config", "schema", "-o", schema).exit_code == 0
    found = json.loads(schema.read_text())
    assert set(found["required"]) == {"model", "data"}
    assert found["$defs"]["TrainSection"]["additionalProperties"] is False


def test_a_file_is_no_checkpoint_and_the_way_to_one_is_told(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"")
    for command in (["inspect"], ["verify"], ["export"]):
        done = run("checkpoint", *command, file, *[tmp_path / "out"] * (command == ["export"]))
        assert done.exit_code == 2
        assert f"'{file}' is a file" in " ".join(done.stderr.split())
        assert "raypar checkpoint convert" in " ".join(done.stderr.split())


def test_shells_complete_paths_and_keys() -> None:
    def completed(*words: str) -> list[tuple[str, str]]:
        *before, begun = words
        shell = BashComplete(main, {}, "raypar", "_RAYPAR_COMPLETE")
        return [(item.type, item.value) for item in shell.get_completions(before, begun)]

    for words in (["train"], ["plan"], ["report"], ["explain"], ["checkpoint", "export"]):
        assert completed(*words, "exa") == [("file", "exa")], words
    for option in ("--plan", "--cluster", "--trace"):
        assert completed("simulate", "a.yaml", option, "pl") == [("file", "pl")], option
    assert completed("train", "a.yaml", "--set", "train.eng") == [("plain", "train.engine=")]
    assert ("plain", "doctor") in completed("do")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert "_RAYPAR_COMPLETE" in done.stdout


def test_a_run_is_resumed_inspected_and_reported(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    steps = ("--num-workers", 0, "--set", "train.steps")
    assert run("train", config_file, *steps[:2], "--set", "train.steps=2").exit_code == 0
    resumed = run("resume", folder, "--set", "train.steps=4", "--json", tmp_path / "out.json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((tmp_path / "out.json").read_text())["total_steps"] == 4
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    again = run("resume", folder)
    assert again.exit_code == 0, again.output
    inspected = run("checkpoint", "inspect", folder)
    assert inspected.exit_code == 0
    assert "-step-4" in inspected.stdout
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert run("checkpoint", "verify", folder).exit_code == 0
    assert run("report", folder).exit_code == 0
    assert (folder / "report.html").stat().st_size > 10_000
    nothing = run("resume", tmp_path)
    assert nothing.exit_code == 2
    assert "holds no run that was started from a config" in nothing.stderr


@pytest.mark.thorough  # tests/train/test_storages and the resume above
def test_a_run_that_keeps_its_checkpoints_elsewhere_is_resumed_from_there(
    config_file: Path, tmp_path: Path
) -> None:
    folder, away = tmp_path / "runs" / "small", tmp_path / "away"
    place = ("--set", f"checkpoint.storage={away}")
    trained = run("train", config_file, "--num-workers", 0, *place)
    assert trained.exit_code == 0, trained.output
    resumed = run("resume", folder, "--num-workers", 0, "--set", "train.steps=3")
    assert resumed.exit_code == 0, resumed.output
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    inside = run("checkpoint", "inspect", folder)
    assert inside.exit_code == 1
    assert "elsewhere (checkpoint.storage)" in inside.stderr
    assert run("checkpoint", "inspect", next(away.glob("*-step-3"))).exit_code == 0
    shutil.rmtree(away)
    nothing = run("resume", folder)
    assert nothing.exit_code == 1
    assert "ended before it wrote one. Start it anew: raypar train" in nothing.stderr


def test_bench_tells_measured_and_predicted(config_file: Path, tmp_path: Path) -> None:
    done = run("bench", config_file, "--num-workers", 0, "--steps", 4)
    assert done.exit_code == 0, done.output
    assert "measured ÷ predicted" in done.stdout
    assert "(costs: uncalibrated: device table)" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("left", "code"), [(True, 2), (False, None)])
def test_a_process_whose_end_would_wait_for_a_head_that_hangs_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, left: bool, code: int | None
) -> None:
    ends = list[int]()
    monkeypatch.setattr("raypar.train.session.exit_would_hang", lambda: left)
    monkeypatch.setattr(os, "_exit", ends.append)
    assert run("config", "check", "no-such.yaml").exit_code == 2
    assert ends == ([code] if left else [])
