"""The YAML of a run: its schema, loader and overrides.

Every key does something: what raypar cannot do yet has no key, and an unknown key is refused with
the nearest right one. `surface()` lists all of them; a test freezes that list.
"""

from __future__ import annotations

import importlib
import os
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from raypar._config_checks import contradictions
from raypar._schema_text import expected, inline, problem, section_of, show
from raypar._sections import (
    CheckpointSection,
    CommConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunSection,
    SchedulerConfig,
    SearchSection,
    Section,
    TrainSection,
)
from raypar._yaml import dump_yaml, parse_yaml
from raypar.errors import ConfigError, did_you_mean

CONFIG_FORMAT = 1
"""Number of the form of configs that this raypar writes; it reads this one and older ones."""

STUDY_KEYS = (
    "sampler", "trials", "budget_s", "seed", "seeds", "measure", "profile", "storage"
)  # fmt: skip
"""Keys of section ``search`` that other planners than optuna do not obey, save for some that end
their search after ``budget_s``."""


class Config(Section):
    """A whole run; see `raypar config` for every key with its meaning."""

    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    search: SearchSection = SearchSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    comm: CommConfig = CommConfig()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        for sentence in contradictions(self):
            raise ValueError(sentence)
        return self

    def to_yaml(self) -> str:
        """The whole configuration as YAML text; `load_config` reads it back as an equal value."""
        return dump_yaml({"format": CONFIG_FORMAT, **self.model_dump()})

    def resolved(self, **became: Any) -> Config:
        """A copy in which every ``auto`` (or null) named by a dotted key has its final value.

        Args:
            **became: Dotted key → value, such as ``**{"search.stages": 2}``.

        Raises:
            ConfigError: A key that does not exist, or a value of the wrong type.
        """
        tree = self.model_dump()
        for key, value in became.items():
            _put(tree, key.split("."), value, key)
        return _validate(tree, "the resolved configuration")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies ``a.b=value`` overrides on top.

    Args:
        path: The file.
        overrides: Texts ``dotted.key=value``; the value is read as YAML, so that ``3`` is a
            number, ``null`` is nothing and ``{lr: 1e-3}`` is a mapping.

    Raises:
        ConfigError: No such file, not YAML, an unknown or repeated key, a value of the wrong
            type, an override without ``=``, or a newer format.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read config file {str(path)!r}: {reason}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of {', '.join(Config.model_fields)}; "
            f"found {show(tree)}. `raypar config` prints a complete one"
        )
    if "graph_hash" in tree:
        raise ConfigError(
            f"{path} is a plan, not a config: give the config of the run, and the plan beside it "
            f"as --plan {path}"
        )
    said: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set takes key=value with a dotted key, such as train.steps=20; got {override!r}"
            )
        if key in said:
            raise ConfigError(
                f"{key} is overridden twice, by {said[key]!r} and by {override!r}: remove one"
            )
        said[key] = override
        _put(tree, key.split("."), parse_yaml(value, f"--set {key}"), key)
    _check_format(tree.pop("format", CONFIG_FORMAT), str(path))
    return _validate(tree, str(path))


def resolve_target(target: str, key: str) -> Callable[..., Any]:
    """Imports ``module:name``; modules of the working directory are found too.

    Args:
        target: What to import; the name may be dotted (``module:Class.method``).
        key: The config key it comes from, for the error.

    Raises:
        ConfigError: The module does not import, has no such name, or the name is not callable.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}: {target!r} is not of the form 'module:name'")
    here = _working_directory()
    if here is not None and here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise ConfigError(
                f"{key}: there is no module {missing!r} (asked for {target!r}); looked in the "
                f"working directory {here or 'of this process, which was deleted,'} and in the "
                "installed packages. Start raypar where the module's folder is, or put that folder "
                "on PYTHONPATH"
            ) from None
        raise ConfigError(
            f"{key}: importing {module_name!r} failed: it needs {missing!r}, which is not installed"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise ConfigError(
                f"{key}: module {module_name!r} has no {name!r}.{did_you_mean(part, public)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{key}: {target!r} is {show(found)}, which cannot be called; name a function or class"
        )
    return typing.cast(Callable[..., Any], found)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted, as Ray may do with that of a job
        return None


def default_yaml() -> str:
    """Every key with its default and its meaning; needed keys hold an example's value."""
    lines = [f"{f'format: {CONFIG_FORMAT}':<42}  # number of the form of this file"]
    for section_name, section in Config.model_fields.items():
        lines.append(f"{section_name}:  # {(section_of(section).__doc__ or '').strip()}")
        for name, info in section_of(section).model_fields.items():
            value = info.examples[0] if info.is_required() and info.examples else info.default
            left = f"  {name}: {inline(value)}"
            needed = "needed; " if info.is_required() else ""
            lines.append(f"{left:<42}  # {needed}{info.description} ({expected(info)})")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The schema of a config file as JSON Schema, for editors that complete and check YAML."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "raypar config"
    schema["properties"]["format"] = {
        "type": "integer",
        "minimum": 1,
        "maximum": CONFIG_FORMAT,
        "default": CONFIG_FORMAT,
        "description": "number of the form of this file",
    }
    return schema


def surface() -> list[str]:
    """One line for every key: its name, what it takes and its default."""
    lines = [f"format: a number from 1 to {CONFIG_FORMAT}; default {CONFIG_FORMAT}"]
    for section_name, section in Config.model_fields.items():
        for name, info in section_of(section).model_fields.items():
            default = "needed" if info.is_required() else f"default {inline(info.default)}"
            lines.append(f"{section_name}.{name}: {expected(info)}; {default}")
    return lines


def _check_format(found: Any, where: str) -> None:
    """Raises where a config is of a newer form, before its keys are looked at."""
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ConfigError(
            f"{where}: format is {show(found)}; this raypar writes {CONFIG_FORMAT}: set format: "
            f"{CONFIG_FORMAT}, or leave it out"
        )
    if found > CONFIG_FORMAT:
        raise ConfigError(
            f"{where} has format {found}, this raypar reads up to {CONFIG_FORMAT}: upgrade raypar"
        )


def _put(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for depth, part in enumerate(path[:-1]):
        below = tree.setdefault(part, {})
        if below is None:
            below = tree[part] = {}
        if not isinstance(below, dict):
            raise ConfigError(
                f"--set {key}: {'.'.join(path[: depth + 1])} is {show(below)}, which has no keys"
            )
        tree = below
    tree[path[-1]] = value


def _validate(tree: dict[str, Any], where: str) -> Config:
    # A section that is absent, or empty ("mesh:" with nothing below), means its defaults.
    absent: dict[str, Any] = {name: {} for name in Config.model_fields if tree.get(name) is None}
    tree = {**tree, **absent}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = dict.fromkeys(problem(detail, Config) for detail in error.errors())
        text = "\n  ".join(problems)
        raise ConfigError(
            f"{where}: {text}" if len(problems) == 1 else f"{where}:\n  {text}"
        ) from None
