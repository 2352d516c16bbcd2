"""The sections of a run's YAML: every key with its type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Count = Annotated[int, Ge(1)]
Text = Annotated[str, MinLen(1)]
Target = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
Kwargs = dict[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
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
    precision: Literal["fp32", "fp64", "bf16", "fp16"] = Field(
        default="fp32",
        description="fp32, fp64: dtype of parameters and floating-point inputs; bf16, fp16: "
        "autocast over fp32 parameters (fp16 with loss scaling)",
    )
    init_from: Text | None = Field(
        default=None,
        description="weights to begin with: a Hugging Face folder, a safetensors file, a "
        "checkpoint or a run's folder; null: the seed makes them",
    )


class DataConfig(Section):
    """What it is trained on."""

    target: Target = Field(
        description="called as target(global_batch=..., **kwargs); returns batches, or, called "
        "without global_batch, a data set of samples",
        examples=["examples.data:stdlib_bytes"],
    )
    global_batch: Count = Field(description="samples of one step", examples=[32])
    kwargs: Kwargs = Field(default={}, description="its other keyword arguments")
    shuffle: bool = Field(
        default=False, description="of a data set of samples: an own order in every epoch"
    )
    drop_last: bool = Field(
        default=True,
        description="of a data set: leave out what fills no batch; else batches run on",
    )
    num_workers: Annotated[int, Ge(0)] = Field(
        default=0, description="of a data set: processes that read, for each rank that does"
    )


class EvaluationConfig(Section):
    """What it is evaluated on while it trains."""

    target: Target | None = Field(
        default=None,
        description="called like data.target, with data.global_batch; null: no evaluation",
    )
    kwargs: Kwargs = Field(default={}, description="its other keyword arguments")
    every_steps: Count | None = Field(
        default=None, description="optimizer steps between evaluations; null: at the end"
    )
    weights: Literal["live", "ema"] = Field(
        default="live", description="which weights: live, or ema, the average of train.ema_decay"
    )
    stop_metric: Text | None = Field(
        default=None, description="ends the run when it no longer gets better, such as eval_loss"
    )
    stop_patience: Count = Field(
        default=3, description="evaluations in a row that may bring nothing better"
    )
    stop_min_delta: Annotated[float, Ge(0)] = Field(
        default=0.0, description="by how much a value has to be better to count"
    )
    stop_mode: Literal["min", "max"] = Field(default="min", description="which values are better")


class MeshConfig(Section):
    """What it is trained on, seen as machines."""

    num_workers: Annotated[int, Ge(0)] | Auto | list[Count] = Field(
        default="auto",
        description="devices; auto: what the plan or cluster has; 0: one process, no Ray; "
        "[least, most]: asks the autoscaler",
    )
    placement_timeout_s: Annotated[float, Gt(0)] = Field(
        default=30.0, description="seconds to wait for devices that other jobs hold"
    )
    scale_up_timeout_s: Annotated[float, Gt(0)] = Field(
        default=180.0,
        description="seconds to wait for the autoscaler's nodes, and after a failure for devices",
    )
    start_timeout_s: Annotated[float, Gt(0)] | None = Field(
        default=None,
        description="seconds that ranks may take to build and compile their parts of the model; "
        "null: 300, or 1800 where they are compiled",
    )
    device: Literal["cpu", "gpu"] = Field(default="cpu", description="what a device is")
    cpus_per_worker: Annotated[float, Gt(0)] = Field(
        default=1.0, description="CPUs that Ray reserves for each device"
    )
    threads_per_worker: Count | None = Field(
        default=None, description="torch threads of each device; null: the cores, shared evenly"
    )


class SearchSection(Section):
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
        default=1, description="stages that each device holds; over 1 needs an interleaved schedule"
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
        description="planners whose plans the study starts from; auto: alpa, piper, and for "
        "models that are not too long placement; on 8 or more devices that are all alike also "
        "regular plans, every stage alike",
    )
    cost_model: Literal["auto", "analytic", "learned"] = Field(
        default="auto",
        description="learned: corrected by what was measured on such a cluster; auto: learned "
        "where there is something",
    )
    measure: Annotated[int, Ge(0)] | Auto = Field(
        default="auto", description="plans that may really be run while searching"
    )
    profile: Annotated[int, Ge(0)] | Auto = Field(
        default="auto",
        description="stages that may be run alone on one device, before whole plans are; auto: 8 "
        "where training searches on its own devices, else none",
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


class TrainSection(Section):
    """How it is trained."""

    steps: Count | None = Field(
        default=None, description="optimizer steps; null: 100, or as many as epochs makes"
    )
    epochs: Count | None = Field(default=None, description="times through the data")
    time_limit_s: Annotated[float, Gt(0)] | None = Field(
        default=None, description="training seconds after which the run ends early"
    )
    microbatches: Count | Auto = Field(
        default="auto", description="equal parts of a batch that flow through the pipeline"
    )
    schedule: Literal[
        "auto",
        "gpipe",
        "1f1b",
        "eager_1f1b",
        "interleaved_1f1b",
        "zero_bubble_h1",
        "interleaved_zero_bubble",
        "interleaved_eager",
    ] = Field(default="auto", description="order of forward and backward passes")
    accumulate: Count = Field(
        default=1, description="batches of the data that make one global batch"
    )
    clip_norm: Annotated[float, Gt(0)] | None = Field(
        default=None, description="global gradient norm limit; null: no clipping"
    )
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = Field(
        default=None, description="decay of an average of the weights; null: none is kept"
    )
    engine: Literal["eager", "compiled", "cuda_graph"] = Field(
        default="eager",
        description="how a stage's programs run: as they are, through torch.compile, or as CUDA "
        "graphs (needs mesh.device: gpu)",
    )
    seed: Annotated[int, Ge(0)] = Field(default=0, description="initialisation and dropout")


class OptimizerConfig(Section):
    """What updates the parameters."""

    target: Target = Field(
        default="torch.optim:AdamW", description="called as target(parameters, **kwargs)"
    )
    kwargs: Kwargs = Field(default={}, description="its keyword arguments, such as lr")
    groups: list[Kwargs] = Field(
        default=[],
        description="options of parameters by name, first match: [{match: '*.bias', "
        "weight_decay: 0.0}]",
    )


class SchedulerConfig(Section):
    """What changes the learning rate."""

    target: Target | None = Field(
        default=None,
        description="called as target(optimizer, **kwargs), stepped once a step",
        examples=["torch.optim.lr_scheduler:CosineAnnealingLR"],
    )
    kwargs: Kwargs = Field(default={}, description="its keyword arguments")


class CheckpointSection(Section):
    """When checkpoints are written, into <storage_path>/<name>/checkpoints/."""

    storage: Text | None = Field(
        default=None, description="folder or URL that all ranks reach; null: in the run's folder"
    )
    every_steps: Count | None = Field(default=None, description="optimizer steps between two")
    every_s: Annotated[float, Gt(0)] | None = Field(default=None, description="seconds between two")
    at_end: bool = Field(default=True, description="one at the end, and when the run is stopped")
    keep: Count | None = Field(default=2, description="how many are kept; null: all")
    best_of: Text | None = Field(
        default=None, description="metric whose best are kept, such as eval_loss; null: newest"
    )
    best_order: Literal["min", "max"] = Field(default="min", description="which of it is best")


class CommConfig(Section):
    """How ranks reach each other."""

    interface: Text | None = Field(
        default=None,
        description="interface or network, such as eth1 or 10.0.0.0/16; null: Ray's address",
    )
    port_range: list[Count] | None = Field(
        default=None, description="[first, last] TCP port to listen on; null: any"
    )
    nccl_env: dict[str, str] = Field(
        default={}, description="environment of every rank, such as {NCCL_IB_HCA: mlx5}"
    )


class RunSection(Section):
    """Where the files go: <storage_path>/<name>/, and what happens after failures."""

    name: Text | None = Field(default=None, description="folder of this run; null: made up")
    storage_path: Text = Field(default="runs", description="folder of all runs")
    log_every: Annotated[int, Ge(0)] = Field(
        default=10, description="without a terminal, a line every so many steps; 0: none"
    )
    loggers: list[Literal["tensorboard", "mlflow", "wandb", "ray"]] = Field(
        default=[], description="where metrics go besides metrics.jsonl"
    )
    max_failures: Annotated[int, Ge(-1)] = Field(
        default=0, description="restarts after lost actors or nodes; -1: without limit"
    )
