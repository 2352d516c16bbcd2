import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import raypar as rp
from raypar._sections import TrainSection
from raypar._targets import run_of, scaling_of
from raypar.config import (
    CONFIG_FORMAT,
    Config,
    default_yaml,
    json_schema,
    load_config,
    resolve_target,
    surface,
)
from raypar.errors import ConfigError

MINIMAL = """
model: {target: "examples.models:gpt", kwargs: {layers: 2}}
data: {target: "examples.data:stdlib_bytes", global_batch: 8}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_surface_is_frozen() -> None:
    golden = Path(__file__).with_name("surface.txt").read_text().splitlines()
    assert surface() == golden


def test_defaults(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.model.kwargs == {"layers": 2}
    assert config.mesh.num_workers == "auto"
    assert config.search.planner == "auto"
    assert config.optimizer.target == "torch.optim:AdamW"


def test_the_printed_default_config_loads_and_holds_every_default(tmp_path: Path) -> None:
    path = tmp_path / "default.yaml"
    path.write_text(default_yaml())
    config = load_config(path)
    needed = {"model": {"target": config.model.target}, "data": config.data.model_dump()}
    assert config == Config.model_validate(needed)


def test_overrides_are_read_as_yaml(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["train.steps=7", "train.clip_norm=1e-1", "optimizer.kwargs={lr: 3e-4}", "run.name=x=y"],
    )
    assert config.train.steps == 7
    assert config.train.clip_norm == pytest.approx(0.1)
    assert config.optimizer.kwargs == {"lr": 3e-4}
    assert config.run.name == "x=y"


def test_an_override_may_add_and_replace_a_kwarg(config_file: Path) -> None:
    config = load_config(config_file, ["model.kwargs.layers=5", "model.kwargs.width=64"])
    assert config.model.kwargs == {"layers": 5, "width": 64}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "0.001", ".1e-2"])
def test_numbers_in_scientific_form_are_numbers(config_file: Path, text: str) -> None:
    assert load_config(config_file, [f"optimizer.kwargs.lr={text}"]).optimizer.kwargs["lr"] == 1e-3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=20", ["unknown key 'train.step'", "Did you mean 'train.steps'?"]),
        ("serch.stages=2", ["unknown key 'serch'", "Did you mean 'search'?"]),
        ("steps=2", ["unknown key 'steps'", "Did you mean 'train.steps'?"]),
        ("train.steps=many", ["train.steps: expected a whole number ≥ 1", "'many' (text)"]),
        ("train.steps=0", ["train.steps: expected a whole number ≥ 1", "found 0"]),
        ("train.steps=2.5", ["train.steps: expected a whole number ≥ 1", "2.5"]),
        ("mesh.num_workers=true", ["mesh.num_workers: expected", "True (boolean)"]),
        ("search.stages=some", ["search.stages: expected a whole number ≥ 1 or auto", "'some'"]),
        ("train.schedule=1f2b", ["train.schedule: expected auto | gpipe | 1f1b", "'1f2b'"]),
        ("model.target=gpt", ["model.target: expected text of the form module:name", "'gpt'"]),
        ("model.target=my.net.Net", ["found 'my.net.Net' (text). Write my.net:Net"]),
        ("train.steps='20'", ["found '20' (text). Write 20 without quotes"]),
        ("train.steps=2.5", ["found 2.5 (number)"]),
        ("model.kwargs=3", ["model.kwargs: expected a mapping", "3"]),
        ("mesh=3", ["mesh: expected a mapping", "3"]),
        ("model.target.name=x", ["model.target is", "which has no keys"]),
        ("search.sampler=tpd", ["search.sampler: expected tpe | gp |", "Did you mean 'tpe'?"]),
        ("search.planner=optima", ["search.planner: expected auto | optuna", "mean 'optuna'?"]),
        ("search.cost_model=leaned", ["auto | analytic | learned", "Did you mean 'learned'?"]),
        ("search.trials=0", ["search.trials: expected a whole number ≥ 1 or auto; found 0"]),
        ("search.budget_s=0", ["search.budget_s: expected a number > 0 or auto; found 0"]),
        ("search.budget_s=.inf", ["search.budget_s: expected a number > 0 or auto; found inf"]),
        ("search.seeds=alpa", ["search.seeds: expected a list of text or auto; found 'alpa'"]),
        ("search.cache=1", ["search.cache: expected true or false; found 1"]),
        ("search.manual=p.json", ["search.planner: manual", "'auto'"]),
        ("search.planner=manual", ["search.manual is null", "search.manual: plan.json"]),
        ("train.steps", ["--set takes key=value", "'train.steps'"]),
        ("=3", ["--set takes key=value"]),
        ("train.steps=[1", ["--set train.steps", "not valid YAML"]),
    ],
)
def test_a_wrong_override_says_what_is_wrong(
    config_file: Path, override: str, parts: list[str]
) -> None:
    message = error_of(config_file, override)
    assert all(part in message for part in parts), message


def test_cuda_graphs_are_refused_where_no_gpu_is_asked_for(config_file: Path) -> None:
    message = error_of(config_file, "train.engine=cuda_graph")
    assert "mesh.device is 'cpu'" in message
    assert "train.engine: eager" in message
    alone = ("train.engine=cuda_graph", "mesh.device=gpu", "mesh.num_workers=0")
    assert "mesh.num_workers is 0" in error_of(config_file, *alone)
    assert load_config(config_file, alone[:2]).train.engine == "cuda_graph"
    assert load_config(config_file, ["train.engine=compiled"]).train.engine == "compiled"
    assert "Did you mean 'compiled'?" in error_of(config_file, "train.engine=compile")
    known = json_schema()["$defs"]["TrainSection"]["properties"]["engine"]
    assert known["enum"] == ["eager", "compiled", "cuda_graph"]


def test_a_plan_file_leaves_no_choice_to_other_keys(config_file: Path) -> None:
    manual = ["search.planner=manual", "search.manual=p.json"]
    assert load_config(config_file, manual).search.manual == "p.json"
    message = error_of(config_file, *manual, "train.microbatches=4")
    assert "train.microbatches is 4, but the plan file 'p.json' decides it" in message
    fields = ["search.planner=manual", "search.manual={microbatches: 2}", "search.stages=2"]
    assert load_config(config_file, fields).search.stages == 2


def test_missing_needed_keys_are_named_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 3}")
    message = error_of(path)
    assert "model.target is missing, such as examples.models:gpt" in message
    assert "data.global_batch is missing, such as 32" in message


def test_several_problems_are_told_at_once(config_file: Path) -> None:
    message = error_of(config_file, "train.step=1", "search.stages=x", "run.storage_path=3")
    assert all(key in message for key in ("train.step", "search.stages", "run.storage_path"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert "a config is a mapping of model, data" in error_of(path)


def test_a_plan_that_is_given_as_the_config(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"format": 1, "graph_hash": "3f", "stages": []}')
    assert error_of(path) == (
        f"{path} is a plan, not a config: give the config of the run, and the plan beside it as "
        f"--plan {path}"
    )


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "none.yaml")
    assert "cannot read config file" in error_of(tmp_path)


def test_a_repeated_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  steps: 1\n  steps: 2\n")
    message = error_of(path)
    assert "'steps' is given twice" in message
    assert "line 3" in message


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 1\nmodel: x\n")
    assert "line" in error_of(path)


def test_an_empty_section_is_its_defaults(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "train:\n")
    assert load_config(config_file).train == TrainSection()


def test_yaml_round_trip(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["optimizer.kwargs={lr: 1e-5, betas: [0.9, 0.95]}"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@example(lr=1e16, steps=1, name="0E0")
@given(
    lr=st.floats(min_value=1e-12, max_value=1e12),
    steps=st.integers(1, 10**9),
    name=st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable()),
)
def test_yaml_round_trip_of_values(
    tmp_path_factory: pytest.TempPathFactory, lr: float, steps: int, name: str
) -> None:
    config = Config.model_validate(
        {
            "model": {"target": "a:b"},
            "data": {"target": "a:c", "global_batch": 1},
            "train": {"steps": steps},
            "optimizer": {"kwargs": {"lr": lr}},
            "run": {"name": name},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_resolved_replaces_auto_and_checks_it(config_file: Path) -> None:
    config = load_config(config_file)
    final = config.resolved(**{"search.stages": 2, "train.microbatches": 4, "run.name": "r"})
    assert (final.search.stages, final.train.microbatches, final.run.name) == (2, 4, "r")
    assert config.search.stages == "auto"
    with pytest.raises(ConfigError, match="unknown key"):
        config.resolved(**{"search.stage": 2})


def test_resolve_target_finds_functions_classes_and_methods() -> None:
    assert resolve_target("math:sqrt", "k")(9) == 3
    assert resolve_target("pathlib:Path.cwd", "k")() == Path.cwd()


def test_resolve_target_finds_modules_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_model_here.py").write_text("def make():\n    return 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_target("my_model_here:make", "model.target")() == 5


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("no_such_module_1:x", ["there is no module 'no_such_module_1'", "working directory"]),
        ("math:sqr", ["has no 'sqr'", "Did you mean 'sqrt'?"]),
        ("math:pi", ["cannot be called"]),
        ("math", ["'module:name'"]),
    ],
)
def test_resolve_target_errors(target: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_target(target, "model.target")
    message = str(caught.value)
    assert message.startswith("model.target")
    assert all(part in message for part in parts), message


def test_resolve_target_tells_an_import_that_fails_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_other.py").write_text("import not_installed_xyz\n")
    (tmp_path / "raises_inside.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs 'not_installed_xyz'"):
        resolve_target("needs_other:x", "k")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        resolve_target("raises_inside:x", "k")


def test_resolve_target_where_the_working_directory_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray does with that of a job whose nodes share a disk."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert resolve_target("math:sqrt", "k")(4) == 2
    with pytest.raises(ConfigError, match=r"no module 'not_there_xyz'.*was deleted"):
        resolve_target("not_there_xyz:x", "k")


@pytest.mark.parametrize("number", range(1, CONFIG_FORMAT + 1))
def test_configs_of_every_format_load(number: int) -> None:
    """Written once by the raypar of that time."""
    config = load_config(Path(__file__).parent / "golden" / f"format-{number}.yaml")
    assert config.model.kwargs == {"layers": 2, "width": 32}
    assert (config.mesh.num_workers, config.search.budget_s, config.train.seed) == (4, 20.5, 3)
    assert config.optimizer.groups == [{"match": "*.bias", "weight_decay": 0.0}]
    assert (config.evaluation.stop_metric, config.checkpoint.keep) == ("eval_loss", 3)


def test_a_config_tells_its_format_and_a_newer_one_is_refused(
    config_file: Path, tmp_path: Path
) -> None:
    assert load_config(config_file).to_yaml().startswith(f"format: {CONFIG_FORMAT}\n")
    assert json_schema()["properties"]["format"]["maximum"] == CONFIG_FORMAT
    newer = tmp_path / "newer.yaml"
    newer.write_text(f"format: {CONFIG_FORMAT + 1}\nnew_section: {{a: 1}}\n{MINIMAL}")
    assert f"reads up to {CONFIG_FORMAT}: upgrade raypar" in error_of(newer)
    for wrong in ("0", "true", "'1'", "[]"):
        newer.write_text(f"format: {wrong}\n{MINIMAL}")
        assert f"set format: {CONFIG_FORMAT}, or leave it out" in error_of(newer)


def test_the_same_key_is_overridden_once(config_file: Path) -> None:
    message = error_of(config_file, "train.steps=3", "train.seed=1", "train.steps = 4")
    assert "train.steps is overridden twice" in message
    assert "'train.steps=3'" in message


SAID = {
    rp.ScalingConfig: {
        "num_workers": "mesh.num_workers=[2,4]",
        "use_gpu": "mesh.device=gpu",
        "cpus_per_worker": "mesh.cpus_per_worker=2.0",
        "threads_per_worker": "mesh.threads_per_worker=3",
        "placement_timeout_s": "mesh.placement_timeout_s=120.0",
        "scale_up_timeout_s": "mesh.scale_up_timeout_s=600.0",
        "start_timeout_s": "mesh.start_timeout_s=900.0",
    },
    rp.CheckpointConfig: {
        "storage": "checkpoint.storage=elsewhere",
        "every_steps": "checkpoint.every_steps=7",
        "every_s": "checkpoint.every_s=60.0",
        "at_end": "checkpoint.at_end=false",
        "num_to_keep": "checkpoint.keep=null",
        "score_attribute": "checkpoint.best_of=loss",
        "score_order": "checkpoint.best_order=max",
    },
    rp.FailureConfig: {"max_failures": "run.max_failures=2"},
    rp.RunConfig: {
        "name": "run.name=mine",
        "storage_path": "run.storage_path=mine",
        "log_every": "run.log_every=0",
        "checkpoint_config": "checkpoint.every_steps=7",
        "failure_config": "run.max_failures=2",
        "callbacks": "run.loggers=[ray]",
    },
}
"""Options of a program → how a config says them."""


def test_what_a_program_can_ask_of_a_run_a_config_can(config_file: Path) -> None:
    said = sorted({text for texts in SAID.values() for text in texts.values()})
    config = load_config(config_file, said)
    run = run_of(config)
    for made in (scaling_of(config), run, run.checkpoint_config, run.failure_config):
        default = type(made)()
        fields = [field.name for field in dataclasses.fields(made)]
        assert fields == list(SAID[type(made)])
        for name in fields:
            assert getattr(made, name) != getattr(default, name), f"{type(made).__name__}.{name}"


@pytest.mark.parametrize("key", ["placement_timeout_s", "scale_up_timeout_s", "start_timeout_s"])
def test_devices_are_waited_for_wherever_there_are_some(config_file: Path, key: str) -> None:
    for workers in ("auto", "8", "[2,8]"):
        said = (f"mesh.num_workers={workers}", f"mesh.{key}=600")
        assert getattr(scaling_of(load_config(config_file, said)), key) == 600
    message = error_of(config_file, "mesh.num_workers=0", f"mesh.{key}=600")
    assert f"mesh.{key} is given, but mesh.num_workers is 0" in message
