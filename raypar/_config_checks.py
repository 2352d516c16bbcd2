"""Keys of a config that contradict each other, or that nothing would read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from pydantic import BaseModel

from raypar._sections import (
    CommConfig,
    DataConfig,
    MeshConfig,
    SearchSection,
    TrainSection,
)


class Sections(Protocol):
    """What is looked at of a `raypar.config.Config`."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def mesh(self) -> MeshConfig: ...

    @property
    def search(self) -> SearchSection: ...

    @property
    def train(self) -> TrainSection: ...

    @property
    def comm(self) -> CommConfig: ...


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
"""Keys that a plan file decides."""

_NEEDS = (
    # section, key that the others hang on, the others, an example of it
    (
        "evaluation",
        "target",
        ("kwargs", "every_steps", "weights", "stop_metric"),
        "examples.data:stdlib_bytes",
    ),
    (
        "evaluation",
        "stop_metric",
        ("stop_patience", "stop_min_delta", "stop_mode"),
        "eval_loss",
    ),
    ("scheduler", "target", ("kwargs",), "torch.optim.lr_scheduler:CosineAnnealingLR"),
    ("checkpoint", "best_of", ("best_order",), "eval_loss"),
)


def contradictions(config: Sections) -> Iterator[str]:
    """What is wrong with a config of which every key is right by itself, as sentences."""
    yield from _planners(config)
    for section, key, others, example in _NEEDS:
        if getattr(getattr(config, section), key) is not None:
            continue
        for other in others:
            if _given(config, section, other):
                yield (
                    f"{section}.{other} is given, but {section}.{key} is null, and so nothing "
                    f"would read it: set {section}.{key}, for example {example}, or remove "
                    f"{section}.{other}"
                )
    train, mesh = config.train, config.mesh
    if train.steps is not None and train.epochs is not None:
        yield (
            f"train.steps is {train.steps} and train.epochs is {train.epochs}; both say when the "
            "run ends: remove one"
        )
    workers = mesh.num_workers
    if isinstance(workers, list) and (len(workers) != 2 or workers[0] > workers[1]):
        yield f"mesh.num_workers is {workers}; a range is [least, most], for example [2, 8]"
    if train.engine == "cuda_graph" and (mesh.device != "gpu" or workers == 0):
        cause = (
            "mesh.num_workers is 0, and one process without Ray runs on CPU tensors: set it to 1 "
            "or more with mesh.device: gpu"
            if mesh.device == "gpu"
            else "mesh.device is 'cpu', where there are no CUDA graphs: set mesh.device: gpu"
        )
        yield f"train.engine is 'cuda_graph', but {cause}, or train.engine: eager (or compiled)"
    ports = config.comm.port_range
    if ports is not None and (len(ports) != 2 or not 1024 <= ports[0] <= ports[1] <= 65535):
        yield (
            f"comm.port_range is {ports}; it is [first, last] between 1024 and 65535, for example "
            "[20000, 20100]"
        )
    if config.comm.nccl_env and mesh.device != "gpu":
        yield (
            "comm.nccl_env is given, but mesh.device is 'cpu', where no NCCL runs: set "
            "mesh.device: gpu, or remove it"
        )
    if workers == 0:
        for key in ("placement_timeout_s", "scale_up_timeout_s", "start_timeout_s"):
            if _given(config, "mesh", key):
                yield (
                    f"mesh.{key} is given, but mesh.num_workers is 0: one process waits for no "
                    "devices; remove it, or set mesh.num_workers: auto"
                )
        for key in ("interface", "port_range"):
            if getattr(config.comm, key) is not None:
                yield (
                    f"comm.{key} is given, but mesh.num_workers is 0: one process has no network; "
                    "remove it"
                )


def _planners(config: Sections) -> Iterator[str]:
    search = config.search
    if search.planner == "manual" and search.manual is None:
        yield (
            "search.planner is 'manual' and search.manual is null: give a plan file or a "
            "mapping of plan fields, such as search.manual: plan.json"
        )
    if search.planner != "manual" and search.manual is not None:
        yield (
            f"search.manual is given, but search.planner is {search.planner!r}, which would "
            "ignore it: set search.planner: manual, or search.manual: null"
        )
    if isinstance(search.manual, str):
        for section, name in IN_A_PLAN_FILE:
            if _given(config, section, name):
                yield (
                    f"{section}.{name} is {getattr(getattr(config, section), name)!r}, but the "
                    f"plan file {search.manual!r} decides it: remove {section}.{name}, or give "
                    "search.manual as a mapping of the fields to change"
                )


def _given(config: Sections, section: str, name: str) -> bool:
    holder: BaseModel = getattr(config, section)
    return bool(getattr(holder, name) != type(holder).model_fields[name].default)
