"""Nothing that is loaded can run code: where the package could, each place is listed with why not.

A new use of pickle, exec, eval, a dynamic import or an unsafe loader fails here until it is either
taken out or listed with its reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend

PACKAGE = Path(__file__).resolve().parents[2] / "raypar"

OWN_ACTORS = "bytes that another actor of the same run sent through Ray, which pickles by itself"
ALLOWED: dict[tuple[str, str], str] = {
    ("stages/faults.py", "pickle.loads"): OWN_ACTORS,
    ("stages/remote.py", "pickle.loads"): OWN_ACTORS,
    ("train/_warm_pool.py", "pickle.loads"): OWN_ACTORS,
    ("train/executor.py", "pickle.loads"): "the error that it pickled itself the line before",
    ("programs/codegen.py", "exec"): (
        "the program that it wrote itself: names are its own, arguments' names are checked, "
        "targets come from the allow-list of `programs/wire.py`"
    ),
    ("programs/codegen.py", "compile"): "as exec",
    ("config.py", "importlib.import_module"): "`module:name` that the user's own config names",
    ("_lazy.py", "importlib.import_module"): "raypar's own modules, from a table",
    ("comm/registry.py", "importlib.import_module"): "what Python code registered as a backend",
    ("comm/_nccl_api.py", "importlib.import_module"): "cupy",
    ("mesh/_node_facts.py", "importlib.import_module"): "raypar's own version",
    ("search/study/samplers.py", "importlib.import_module"): "a package of a table of samplers",
    ("train/loggers/base.py", "importlib.import_module"): "a tracker's package, from a table",
    ("train/weights/torch_file.py", "torch.load"): "with weights_only=True, and memory-mapped",
    ("stages/actor.py", "importlib.import_module"): "raypar's own interpreter, ahead of time",
    ("_yaml.py", "yaml.load"): "with a subclass of yaml.SafeLoader",
}
"""(file, call) → why nothing that is loaded gets there."""

_BY_NAME = {"eval", "exec", "compile", "__import__"}
_BY_MODULE = {
    "pickle": None,
    "cloudpickle": {"loads", "load"},
    "marshal": None,
    "shelve": None,
    "dill": None,
    "joblib": None,
    "importlib": {"import_module"},
    "runpy": None,
    "os": {"system", "popen"},
    "yaml": {"load", "load_all", "full_load", "unsafe_load"},
    "torch": {"load"},
    "numpy": {"load"},
    "np": {"load"},
    "jit": {"load"},
}
_HARMLESS = {"pickle.dumps", "pickle.HIGHEST_PROTOCOL", "pickle.PicklingError"}


def suspicious(source: str) -> list[tuple[int, str]]:
    """(line, name) of every use of what could run code."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _BY_NAME:
                found.append((node.lineno, node.func.id))
        elif isinstance(node, ast.Attribute):
            owner = node.value
            module = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            names = _BY_MODULE.get(module, set())
            said = f"{module}.{node.attr}"
            if (names is None or node.attr in names) and said not in _HARMLESS:
                found.append((node.lineno, said))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = _BY_MODULE.get(node.module.split(".")[-1], set())
            found += [
                (node.lineno, f"{node.module}.{a.name}")
                for a in node.names
                if names is None or a.name in names
            ]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            found.append((node.value.lineno, f"{node.arg}="))
    return found


def test_every_place_that_could_run_code_is_listed() -> None:
    used: set[tuple[str, str]] = set()
    unlisted: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, said in suspicious(path.read_text(encoding="utf-8")):
            used.add((name, said))
            if (name, said) not in ALLOWED:
                unlisted.append(f"raypar/{name}:{line}: {said}")
    assert not unlisted, "\n".join(unlisted)
    assert not set(ALLOWED) - used, "listed, but not there any more: take it out of the list"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "from pickle import loads",
        "from ray.cloudpickle import loads",
        "eval(x)",
        "import torch\ntorch.load(x)",
        "import torch\ntorch.jit.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import yaml\nyaml.load(x, Loader=yaml.Loader)",
        "import subprocess\nsubprocess.run(x, shell=True)",
    ],
)
def test_the_search_sees_it(source: str) -> None:
    assert suspicious(source)


def test_optunas_journal_in_a_file_has_no_pickled_snapshots() -> None:
    # Optuna unpickles the snapshots of backends that keep some; raypar opens files alone.
    assert not hasattr(JournalFileBackend, "load_snapshot")
