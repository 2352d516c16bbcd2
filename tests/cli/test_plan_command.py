"""`raypar plan` with the options of the search: known plans, ladders, interruptions, progress."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from raypar._launch import write_resolved
from raypar._search_view import SearchView, ended
from raypar._targets import search_of
from raypar.cli import main
from raypar.config import load_config
from raypar.errors import ConfigError
from raypar.mesh.calibration_files import CACHE_VARIABLE
from raypar.plan import Plan
from raypar.search.ladder import Ladder
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.study.judge import Judge, Outcome

CONFIG = """
model: {target: "examples.models:gpt", kwargs: {layers: 1, width: 8, heads: 2, seq_len: 4}}
data: {target: "examples.data:stdlib_bytes", global_batch: 8, kwargs: {seq_len: 4}}
mesh: {num_workers: 2}
"""

QUICK = ("--set", "search.seeds=[uniform]")
"""Begins with one quick planner instead of all that the default names."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def plan(folder: Path, *options: object) -> Result:
    out = () if "-o" in options else ("-o", folder / "plan.json")
    texts = ("plan", folder / "run.yaml", *out, *options)
    return CliRunner().invoke(main, [str(text) for text in texts])


def refused(done: Result, code: int, *told: str) -> None:
    assert done.exit_code == code, done.output
    message = " ".join(done.stderr.split())
    for text in told:
        assert text in message, message
    assert "Traceback" not in done.output


def test_a_plan_is_searched_for_once_and_its_record_written(folder: Path) -> None:
    options = (*QUICK, "--trials", 3, "--seed", 1, "--save-record", folder / "record.json")
    first = plan(folder, *options)
    assert first.exit_code == 0, first.output
    assert "best step" in first.stderr
    assert "searched 3 trials" in first.stdout
    assert "all trials were made" in first.stdout
    record = SearchRecord.from_json((folder / "record.json").read_text())
    assert (record.planner, record.seed, len(record.trials)) == ("optuna", 1, 3)
    made = Plan.load(folder / "plan.json")
    (entry,) = (folder / "cache" / "plans").iterdir()
    again = plan(folder, *options)
    assert again.exit_code == 0, again.output
    assert "note: taken from the plan cache (made 2" in again.stdout
    assert "--no-cache searches again" in again.stdout
    assert not again.stderr
    assert Plan.load(folder / "plan.json") == made
    entry.write_text("{}")
    spoiled = plan(folder, *options)
    assert spoiled.exit_code == 0, spoiled.output
    assert "the file is kept as" in " ".join(spoiled.stdout.split())
    assert entry.with_suffix(".bad").exists()
    fresh = plan(folder, *options, "--no-cache")
    assert "plan cache" not in fresh.stdout
    assert "searched 3 trials" in fresh.stdout


def test_ctrl_c_gives_the_best_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Judge.look
    calls: list[Any] = []

    def look(judge: Judge, *args: Any, **options: Any) -> Outcome:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return own(judge, *args, **options)

    monkeypatch.setattr(Judge, "look", look)
    done = plan(folder, "--set", "search.seeds=[alpa]")
    assert done.exit_code == 0, done.output
    assert "interrupted" in done.stdout
    assert "this is the best it had found" in done.stdout
    assert Plan.load(folder / "plan.json").planner == "optuna"
    assert not (folder / "cache" / "plans").exists()


def test_a_ladder_is_written_size_by_size(folder: Path) -> None:
    out = folder / "sizes"
    done = plan(folder, "--set", "search.planner=alpa", "--ladder", "1..2", "-o", out)
    assert done.exit_code == 0, done.output
    assert "efficiency" in done.stdout
    assert "2 sizes planned" in done.stdout
    assert len([line for line in done.stderr.splitlines() if " devices: " in line]) == 2
    rungs = Ladder.load(out).rungs
    assert [rung.shape for rung in rungs] == [(1,), (2,)]
    assert Plan.load(out / "plan-2.json") == rungs[1].plan


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ("0..4", "0 devices are asked for"),
        ("8..2", "counts down; give 2..8"),
        ("a", "'a' is no size"),
        ("2..9", "9 devices are asked for, the cluster has 2"),
    ],
)
def test_what_is_no_ladder_is_refused(folder: Path, sizes: str, told: str) -> None:
    refused(plan(folder, "--ladder", sizes), 2, "ConfigError", told)


def test_files_of_one_plan_are_not_written_for_many(folder: Path) -> None:
    done = plan(folder, "--ladder", "2", "--save-record", folder / "r.json")
    refused(done, 2, "tell of one plan")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trials", 0], ["search.trials: expected a whole number ≥ 1 or auto; found 0"]),
        (["--budget", 0], ["search.budget_s: expected a number > 0 or auto; found 0"]),
        (["--budget", "soon"], ["search.budget_s: expected a number > 0", "'soon'"]),
        (["--sampler", "tpee"], ["expected tpe | gp | cmaes | nsga2", "Did you mean 'tpe'?"]),
        (["--seed", -1], ["search.seed: expected a whole number ≥ 0; found -1"]),
        (["--storage", ""], ["--storage: the path is empty", "leave the option out"]),
        (["--set", "search.seeds=[alpha]"], ["'alpha'", "Did you mean 'alpa'?"]),
        (
            ["--trials", 5, "--set", "search.stages=1"],
            ["search.trials is 5", "planner 'uniform'", "set search.planner: optuna"],
        ),
    ],
)
def test_a_wrong_option_of_the_search(folder: Path, options: list[object], told: list[str]) -> None:
    refused(plan(folder, *options), 2, "ConfigError", *told)


SMALL = """
device_kinds:
  Small: {flops: {float32: 1.0e12}, memory: 20 KB, bandwidth: 100 GB/s,
    inside: {bandwidth: 10 GB/s}, across: {bandwidth: 1 GB/s}, host: {bandwidth: 10 GB/s}}
nodes: [{device: Small, devices: 2, host_memory: 8 GB}]
"""


def test_no_feasible_plan_tells_what_binds_and_what_to_change(folder: Path) -> None:
    (folder / "small.yaml").write_text(SMALL)
    wide = ("--set", "model.kwargs.width=512", "--cluster", folder / "small.yaml")
    refused(plan(folder, "--trials", 2, *QUICK, *wide), 1, "PlanError", "memory")
    done = plan(
        folder, "--set", "search.planner=alpa", *wide, "--ladder", "1,2", "-o", folder / "l"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.count("no plan: ") == 2
    assert all(rung.plan is None for rung in Ladder.load(folder / "l").rungs)


def test_a_shape_that_was_asked_for_and_does_not_fit_is_not_written(folder: Path) -> None:
    (folder / "small.yaml").write_text(SMALL)
    wide = ("--set", "model.kwargs.width=512", "--set", "search.stages=2")
    asked = (*wide, "--cluster", folder / "small.yaml", "--save-record", folder / "record.json")
    done = plan(folder, *asked)
    refused(
        done, 1, "PlanError: the plan does not fit, and is not written", "of 20 kB",
        "what binds is stage", "--force writes it",
    )  # fmt: skip
    assert "THIS PLAN DOES NOT FIT" in done.stdout
    assert not (folder / "plan.json").exists()
    assert not (folder / "record.json").exists()
    kept = plan(folder, *asked, "--force")
    assert kept.exit_code == 0, kept.output
    assert "THIS PLAN DOES NOT FIT" in kept.stdout
    assert Plan.load(folder / "plan.json").planner == "uniform"
    refused(plan(folder, *asked[:4], "--ladder", "1,2", "--force"), 2, "leave it out")


def test_a_corrupt_journal_is_set_aside(folder: Path) -> None:
    journal = folder / "study: one.journal"
    journal.write_text("no journal\n")
    done = plan(folder, *QUICK, "--trials", 2, "--storage", journal)
    assert done.exit_code == 0, done.output
    assert "note: " in done.stdout
    assert "journal" in done.stdout
    resumed = plan(folder, *QUICK, "--trials", 3, "--storage", journal)
    assert "resumed a study" in resumed.stdout, resumed.output


def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    done = plan(folder, "--trials", 1, "--save-record", folder / "none" / "record.json")
    refused(done, 2, "--save-record: '", "which is no folder; name a file")


TRIALS = [
    TrialRecord(0, "alpa", {}, "kept", {"simulated": 0.5}, words="1 stage"),
    TrialRecord(1, "tpe", {}, "infeasible"),
    TrialRecord(2, "tpe", {}, "kept", {"simulated": 0.25}, words="2 stages"),
]


def test_without_a_terminal_only_what_is_new_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with SearchView(live=False, clock=lambda: now[0]) as view:
        view(TRIALS[1], None)
        view(TRIALS[0], TRIALS[0])
        view(TRIALS[1], TRIALS[0])
        now[0] = 11.0
        view(TRIALS[1], TRIALS[0])
        view(TRIALS[2], TRIALS[2])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "2 trials in 0 s; best step 500 ms by alpa: 1 stage",
        "2 trials in 11 s; best step 500 ms by alpa: 1 stage; now tpe: infeasible",
        "3 trials in 11 s; best step 250 ms by tpe: 2 stages",
    ]


def test_on_a_terminal_one_line_is_drawn() -> None:
    with SearchView(live=True) as view:
        view(TRIALS[1], None)
        view(TRIALS[0], TRIALS[0])
        assert view._live is not None
        console = Console(record=True, width=100, file=io.StringIO())
        console.print(view._live.get_renderable())
        assert console.export_text().split() == (
            "2 trials in 0 s; best step 500 ms by alpa: 1 stage".split()
        )


def test_how_a_search_ended() -> None:
    record = SearchRecord("optuna", "tpe", 0, tuple(TRIALS), 2, 3.0, stopped="why", notes=("n",))
    assert ended(record) == [
        "searched 3 trials in 3 s; the plan was proposed by tpe; why",
        "note: n",
    ]
    assert ended(dataclasses.replace(record, sampler="", notes=())) == []


def test_every_key_of_the_search_section_reaches_the_search(folder: Path) -> None:
    given = {
        "stages": 3, "replicas": 2, "tensor": 4, "chunks": 2, "recompute": "full", "zero": 1,
        "memory_fraction": 0.5, "sampler": "random", "trials": 3, "budget_s": 4.0, "seed": 5,
        "seeds": ["piper"], "cost_model": "learned", "measure": 6, "profile": 7,
        "storage": "study.journal", "cache": False, "planner": "optuna", "manual": None,
    }  # fmt: skip
    told = [f"search.{name}={value}" for name, value in given.items() if value is not None]
    config = load_config(folder / "run.yaml", told)
    made = search_of(config)
    assert given.keys() == set(type(config.search).model_fields)
    for name, value in given.items():
        assert getattr(made, name) == (("piper",) if name == "seeds" else value), name


def test_a_resolved_config_holds_no_key_that_its_plan_file_makes_idle(folder: Path) -> None:
    assert plan(folder, "--set", "search.planner=alpa").exit_code == 0
    config = load_config(folder / "run.yaml", ["search.trials=3", "search.seed=2"])
    write_resolved(config, Plan.load(folder / "plan.json"), folder)
    again = load_config(folder / "config.resolved.yaml")
    assert search_of(again).chosen_planner == "manual"
    with pytest.raises(ConfigError, match=r"search\.trials is 3, but planner 'alpa'"):
        search_of(load_config(folder / "run.yaml", ["search.planner=alpa", "search.trials=3"]))
    timed = load_config(folder / "run.yaml", ["search.planner=alpa", "search.budget_s=3"])
    assert search_of(timed).budget_s == 3
    with pytest.raises(ConfigError, match=r"search\.budget_s is 3\.0, but planner 'uniform'"):
        search_of(load_config(folder / "run.yaml", ["search.stages=2", "search.budget_s=3"]))
