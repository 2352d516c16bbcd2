"""The project's own promises: its documents name what exists, its make targets are there."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import raypar
from raypar.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_that_a_document_names_exist(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    assert set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text_of(name), re.M)) <= {
        pair for t in targets for pair in ((t, ""), ("", t))
    }


def recipe_of(target: str) -> str:
    """The command of a target, as make would run it."""
    [line] = re.findall(rf"^{target}:.*\n\t(.*)$", text_of("Makefile"), re.M)
    return str(line)


def test_the_first_tier_leaves_out_what_is_thorough_and_the_other_one_nothing() -> None:
    assert '-m "not thorough"' in recipe_of("test")
    assert "-m " not in recipe_of("test-all").replace("-m pytest", "")
    assert "RAYPAR_THOROUGH=1" in recipe_of("test-all")
    assert " make test " in text_of(".ci/run")


def test_the_tiers_are_told_apart_by_a_marker_that_is_known(pytestconfig: pytest.Config) -> None:
    """A misspelt one would leave a test in the first tier: pytest refuses what it does not know."""
    assert pytestconfig.getoption("strict_markers")
    known = {re.split(r"[:(]", line)[0].strip() for line in pytestconfig.getini("markers")}
    assert {"gpu", "ray", "slow", "thorough"} <= known


def test_every_file_has_tests_of_the_first_tier() -> None:
    """What is thorough repeats something, which lies most often in the same file."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        left_out = [
            t for t in tests if "pytest.mark.thorough" in map(ast.unparse, t.decorator_list)
        ]
        assert not tests or len(left_out) < len(tests), path


def test_workers_of_one_run_share_files_whole(request: pytest.FixtureRequest) -> None:
    """Else each of them captures, plans and starts what the tests of a file share."""
    if getattr(request.config, "workerinput", None) is None:
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith(f"@{__file__}")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    found = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|toml|txt|sh))`", text_of(name))
    places = [ROOT, ROOT / "raypar", *(p for p in (ROOT / "raypar").iterdir() if p.is_dir())]
    runs = {"my.yaml", "config.resolved.yaml"}
    missing = {f for f in found if f not in runs and not any((p / f).exists() for p in places)}
    assert not missing


def test_commands_that_the_readme_names_exist() -> None:
    lines = re.findall(r"^raypar .*$", text_of("README.md"), re.M)
    assert {line.split()[1] for line in lines} == {
        "doctor", "plan", "report", "resume", "submit", "train",
    }  # fmt: skip
    for line in lines:
        command = line.split()[1]
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0, line


def test_options_of_the_readme_commands_exist() -> None:
    for line in re.findall(r"^(?:raypar|.*-- raypar) .*$", text_of("README.md"), re.M):
        words = line.split("#")[0].split("raypar ")[-1].split()
        help_text = CliRunner().invoke(main, [words[0], "--help"]).output
        for option in (w for w in words if w.startswith("-")):
            assert option in help_text, line


def test_every_room_is_in_the_architecture() -> None:
    text = text_of("ARCHITECTURE.md")
    package = ROOT / "raypar"
    rooms = [f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()]
    modules = [p.name for p in package.glob("*.py") if p.name != "__init__.py"]
    assert not [name for name in rooms + modules if f"`{name}`" not in text]


def test_every_room_is_on_a_floor() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = set(re.findall(r"\((\w+)\)", " ".join(layers)))
    package = ROOT / "raypar"
    rooms = {p.name for p in package.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert rooms <= named


def test_every_extra_and_core_dependency_is_declared() -> None:
    core = {re.split(r"[<>=]", d)[0] for d in PROJECT["project"]["dependencies"]}
    assert core == {
        "click", "fsspec", "highspy", "jinja2", "networkx", "numpy", "optuna", "pydantic",
        "pyyaml", "ray[default]", "rich", "safetensors", "torch",
    }  # fmt: skip
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {
        "cuda12", "cuda13", "data", "dev", "hf", "mlflow", "samplers", "tensorboard", "tune",
        "viz", "wandb",
    }  # fmt: skip


def test_third_party_imports_are_declared() -> None:
    """What the package imports at top level is a core dependency, or comes with one."""
    names = {
        "annotated_types": "pydantic",
        "yaml": "pyyaml",
        "markupsafe": "jinja2",
        "ray": "ray[default]",
    }
    core = {re.split(r"[<>=]", d)[0] for d in PROJECT["project"]["dependencies"]}
    for path in (ROOT / "raypar").rglob("*.py"):
        if "testing" in path.parts:
            continue  # its conformance suites need pytest and hypothesis, and say so
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (n.partition(".")[0] for n in imported):
                if name not in sys.stdlib_module_names and name != "raypar":
                    assert names.get(name, name) in core, f"{path}: {name}"


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {raypar.__version__}" in text_of("CHANGELOG.md")


def test_the_license_is_apache_2() -> None:
    text = text_of("LICENSE")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "raypar" / "py.typed").exists()


def test_torch_in_the_makefile_is_the_torch_of_the_package() -> None:
    torch = next(d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    assert f"TORCH ?= {torch}" in text_of("Makefile")
