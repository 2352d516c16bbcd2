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
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raypar._schema_text import expected, inline, problem, section_of, show
from raypar._yaml import dump_yaml, parse_yaml
from raypar.errors import ConfigError, did_you_mean

Auto = Literal["auto"]
Count = Annotated[int, Ge(1)]
Text = Annotated[str, MinLen(1)]
Target = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
Kwargs = dict[str, Any]


IN_A_PLAN_FILE = (
    ("search", "stages"),
    ("search", "replicas"),
    ("search", "tensor"),
    ("search", "chunks"),
    ("search", "recompute"),
    ("search", "zero"),
    ("search", "memory_fraction"),
    ("train", "microbatches"),
    ("train", "schedule"),
)
STUDY_KEYS = ("sampler", "trials", "budget_s", "seed", "seeds", "measure", "storage")
"""Keys of section ``search`` that planner optuna alone obeys."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(_Section):
    """What is trained."""

    target: Target = Field(
        description="makes the model: a function or nn.Module class",
        examples=["examples.models:gpt"],
    )
    kwargs: Kwargs = Field(default={}, description="its keyword arguments")
    loss: Target | None = Field(
        default=None,
        description="of the output (and the batch); null: the output is the loss or has .loss",
    )
    precision: Literal["fp32", "fp64"] = Field(
        default="fp32", description="dtype of parameters and of floating-point inputs"
    )


class DataConfig(_Section):
    """What it is trained on."""

    target: Target = Field(
        description="called as target(global_batch=..., **kwargs); returns an iterable of batches",
        examples=["examples.data:stdlib_bytes"],
    )
    global_batch: Count = Field(description="samples of one step", examples=[32])
    kwargs: Kwargs = Field(default={}, description="its other keyword arguments")


class MeshConfig(_Section):
    """What it is trained on, seen as machines."""

    num_workers: Annotated[int, Ge(0)] | Auto = Field(
        default="auto",
        description="devices; auto: what the plan or cluster has; 0: one process, no Ray",
    )
    device: Literal["cpu", "gpu"] = Field(default="cpu", description="what a device is")
    cpus_per_worker: Annotated[float, Gt(0)] = Field(
        default=1.0, description="CPUs that Ray reserves for each device"
    )
    threads_per_worker: Count | None = Field(
        default=None, description="torch threads of each device; null: the cores, shared evenly"
    )


class SearchSection(_Section):
    """How the model is split."""

    planner: Literal[
        "auto", "optuna", "alpa", "piper", "placement", "exhaustive", "uniform", "manual"
    ] = Field(
        default="auto",
        description="optuna: a study that starts from the exact planners alpa, piper, placement "
        "and exhaustive; uniform: stages balanced by work; manual: yours; auto: uniform where "
        "stages, replicas, tensor or chunks are given, else optuna",
    )
    stages: Count | Auto = Field(default="auto", description="pipeline stages")
    replicas: Count | Auto = Field(default="auto", description="data-parallel copies of each stage")
    tensor: Count | Auto = Field(
        default="auto", description="devices over which the ops of a stage are sharded"
    )
    chunks: Count = Field(
        default=1, description="stages that each device holds; over 1 needs interleaved_1f1b"
    )
    recompute: Literal["auto", "none", "selective", "full"] = Field(
        default="auto", description="what backward computes again instead of keeping it"
    )
    zero: Annotated[int, Ge(0), Le(3)] | Auto = Field(
        default="auto",
        description="what whole-held parameters are cut for: 1 optimizer state, 2 gradients too, "
        "3 parameters too",
    )
    memory_fraction: Annotated[float, Gt(0), Le(1)] = Field(
        default=0.9, description="share of a device's memory that a plan may fill"
    )
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "random"] = Field(
        default="tpe",
        description="who proposes plans to planner optuna; nsga2 weighs step time, memory and "
        "devices",
    )
    trials: Count | Auto = Field(default="auto", description="plans that the study looks at")
    budget_s: Annotated[float, Gt(0), Lt(float("inf"))] | Auto = Field(
        default="auto", description="seconds of search, measurements included"
    )
    seed: Annotated[int, Ge(0)] = Field(
        default=0, description="of the sampler: the same seed and trials give the same plan"
    )
    seeds: list[Text] | Auto = Field(
        default="auto",
        description="planners whose plans the study starts from; auto: alpa, and for models that "
        "are not too long piper and placement too",
    )
    cost_model: Literal["auto", "analytic", "learned"] = Field(
        default="auto",
        description="learned: corrected by what was measured on such a cluster; auto: learned "
        "where there is something",
    )
    measure: Annotated[int, Ge(0)] | Auto = Field(
        default="auto", description="plans that may really be run while searching"
    )
    storage: Text | None = Field(
        default=None, description="journal file of the study, which goes on where it is there"
    )
    cache: bool = Field(
        default=True, description="take the plan that was found before for the same question"
    )
    manual: Text | Kwargs | None = Field(
        default=None, description="planner manual: a plan file, or fields that override uniform's"
    )


class TrainSection(_Section):
    """How it is trained."""

    steps: Count = Field(default=100, description="optimizer steps")
    microbatches: Count | Auto = Field(
        default="auto", description="equal parts of a batch that flow through the pipeline"
    )
    schedule: Literal[
        "auto", "gpipe", "1f1b", "eager_1f1b", "interleaved_1f1b", "zero_bubble_h1"
    ] = Field(default="auto", description="order of forward and backward passes")
    clip_norm: Annotated[float, Gt(0)] | None = Field(
        default=None, description="global gradient norm limit; null: no clipping"
    )
    seed: Annotated[int, Ge(0)] = Field(default=0, description="initialisation and dropout")


class OptimizerConfig(_Section):
    """What updates the parameters."""

    target: Target = Field(
        default="torch.optim:AdamW", description="called as target(parameters, **kwargs)"
    )
    kwargs: Kwargs = Field(default={}, description="its keyword arguments, such as lr")


class RunSection(_Section):
    """Where the files go: <storage_path>/<name>/."""

    name: Text | None = Field(default=None, description="folder of this run; null: made up")
    storage_path: Text = Field(default="runs", description="folder of all runs")
    log_every: Annotated[int, Ge(0)] = Field(
        default=10, description="without a terminal, a line every so many steps; 0: none"
    )


class Config(_Section):
    """A whole run; see `raypar config` for every key with its meaning."""

    model: ModelConfig
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    search: SearchSection = SearchSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        search = self.search
        if search.planner == "manual" and search.manual is None:
            raise ValueError(
                "search.planner is 'manual' and search.manual is null: give a plan file or a "
                "mapping of plan fields, such as search.manual: plan.json"
            )
        if search.planner != "manual" and search.manual is not None:
            raise ValueError(
                f"search.manual is given, but search.planner is {search.planner!r}, which would "
                "ignore it: set search.planner: manual, or search.manual: null"
            )
        if isinstance(search.manual, str):
            for section, name in IN_A_PLAN_FILE:
                holder: BaseModel = getattr(self, section)
                if getattr(holder, name) != type(holder).model_fields[name].default:
                    raise ValueError(
                        f"{section}.{name} is {getattr(holder, name)!r}, but the plan file "
                        f"{search.manual!r} decides it: remove {section}.{name}, or give "
                        "search.manual as a mapping of the fields to change"
                    )
        return self

    def to_yaml(self) -> str:
        """The whole configuration as YAML text; `load_config` reads it back as an equal value."""
        return dump_yaml(self.model_dump())

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
            type, or an override without ``=``.
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
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set takes key=value with a dotted key, such as train.steps=20; got {override!r}"
            )
        _put(tree, key.split("."), parse_yaml(value, f"--set {key}"), key)
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
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise ConfigError(
                f"{key}: there is no module {missing!r} (asked for {target!r}); looked in the "
                f"working directory {os.getcwd()} and in the installed packages. Start raypar "
                "where the module's folder is, or put that folder on PYTHONPATH"
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


def default_yaml() -> str:
    """Every key with its default and its meaning; needed keys hold an example's value."""
    lines: list[str] = []
    for section_name, section in Config.model_fields.items():
        lines.append(f"{section_name}:  # {(section_of(section).__doc__ or '').strip()}")
        for name, info in section_of(section).model_fields.items():
            value = info.examples[0] if info.is_required() and info.examples else info.default
            left = f"  {name}: {inline(value)}"
            needed = "needed; " if info.is_required() else ""
            lines.append(f"{left:<42}  # {needed}{info.description} ({expected(info)})")
    return "\n".join(lines) + "\n"


def surface() -> list[str]:
    """One line for every key: its name, what it takes and its default."""
    lines = []
    for section_name, section in Config.model_fields.items():
        for name, info in section_of(section).model_fields.items():
            default = "needed" if info.is_required() else f"default {inline(info.default)}"
            lines.append(f"{section_name}.{name}: {expected(info)}; {default}")
    return lines


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
