"""The law of the house as a check: a plan trains exactly like the unsplit model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raypar.compat import pytree
from raypar.graph.capture import build_model, capture
from raypar.graph.opgraph import OpGraph
from raypar.graph.passes.randomness import SEEDED
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.plan import plan as make_plan
from raypar.stages.compile import compile_plan
from raypar.stages.consolidate import consolidate
from raypar.stages.optimizers import call_optimizer
from raypar.stages.recipe import Recipe
from raypar.stages.run import Run, StepResult
from raypar.stages.spec import OptimizerFn
from raypar.testing.backends import start_run

ModelFn = Callable[[], nn.Module]

_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
_SCALER_WORDS = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")


@dataclass
class RunRecord:
    """What some steps of training did.

    Attributes:
        losses: Global loss of every step, before its update.
        gradients: For every step, parameter name → gradient (unscaled, before clipping); a
            parameter that gets none is left out, and so are all of a step that was skipped.
        rates: Learning rate of the first parameter group in every step.
        scales: Loss scale of every step; 1 where the loss is not scaled.
        skipped: Whether the loss scaler skipped the step.
        state_dict: Parameters and buffers after the last step, in the model's own names.
        average: The same of the weights' moving average, if there is one.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    average: dict[str, torch.Tensor] = field(default_factory=dict)


def default_optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a learning rate that moves every parameter visibly."""
    return torch.optim.AdamW(params, lr=1e-3)


def run_plan(
    model_fn: ModelFn,
    batch: Any,
    plan: Plan,
    *,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    optimizer: OptimizerFn | None = None,
    steps: int = 3,
    backend: str = "local",
    batch_dims: Any = None,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> RunRecord:
    """Trains some steps on one batch with a plan.

    The model is built as ``torch.manual_seed(seed); model_fn()`` builds it.

    Args:
        model_fn: Builds the model.
        batch: One global batch, used in every step.
        plan: How to split; made for this model and batch.
        loss_fn: As in `raypar.capture`.
        optimizer: Builds the optimizer from parameters; default AdamW.
        steps: How many.
        backend: ``local`` (threads of this process) or ``ray`` (stage actors).
        batch_dims: As in `raypar.capture`; default: the plan's.
        seed: Seed of initialisation and dropout.
        recipe: Clipping, schedule, loss scale, average; default: none of them.

    Raises:
        PlanError: The plan is not for this model and batch.
    """
    dims = list(plan.batch_dims) if batch_dims is None else batch_dims
    graph = capture(model_fn, batch, loss_fn, dims)
    return run_graph(
        graph,
        batch,
        plan,
        optimizer=optimizer,
        steps=steps,
        backend=backend,
        seed=seed,
        recipe=recipe,
    )


def run_graph(
    graph: OpGraph,
    batch: Any,
    plan: Plan,
    *,
    optimizer: OptimizerFn | None = None,
    steps: int = 3,
    backend: str = "local",
    seed: int = 0,
    recipe: Recipe | None = None,
) -> RunRecord:
    """`run_plan` for a model that is captured already."""
    specs = compile_plan(
        graph,
        plan,
        optimizer=optimizer or default_optimizer,
        seed=seed,
        recipe=recipe,
        keep_gradients=True,
    )
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    record = RunRecord()
    run: Run
    with start_run(backend, specs, tensors) as run:
        for step in range(steps):
            run.train(step, 1, lambda r: _note(record, r))
            record.gradients.append({} if record.skipped[-1] else run.gradients())
        record.state_dict = run.state_dict()
        if recipe is not None and recipe.ema_decay is not None:
            record.average = consolidate(specs, run.call("ema_state"))
    return record


def _note(record: RunRecord, result: StepResult) -> None:
    first = result.ranks[0]
    record.losses.append(float(result.loss or 0.0))
    record.rates.append(float(first.lr or 0.0))
    record.scales.append(1.0 if first.loss_scale is None else first.loss_scale)
    record.skipped.append(result.skipped)


def reference_run(
    graph: OpGraph,
    batch: Any,
    plan: Plan,
    *,
    optimizer: OptimizerFn | None = None,
    steps: int = 3,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> RunRecord:
    """What the law compares a plan with.

    Single-process eager PyTorch on the global batch; for a model that feels its microbatches, over
    the same microbatches in order, gradients averaged; for one with dropout, the one-stage plan.
    With a loss scale it accumulates over what the ranks compute at once, too: a gradient of the
    whole batch overflows in float16 at smaller scales than one of a part of it.
    """
    parts = _parts(graph, plan, recipe)
    if any(n.target is SEEDED for n in graph.clean.ops):
        single = make_plan(
            graph, Cluster.local(1), SearchConfig(stages=1, replicas=1, microbatches=parts)
        )
        return run_graph(
            graph, batch, single, optimizer=optimizer, steps=steps, seed=seed, recipe=recipe
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(graph.model_fn, on_meta=False)
    if isinstance(graph.model_fn, nn.Module):
        model = copy.deepcopy(model)
    return _train_plainly(
        graph,
        model,
        _microbatches(graph, batch, parts),
        optimizer or default_optimizer,
        recipe or Recipe(),
        steps,
    )


def _parts(graph: OpGraph, plan: Plan, recipe: Recipe | None) -> int:
    """How many parts of the batch the reference computes one after the other."""
    if graph.feels_microbatches:
        return plan.microbatches
    scaled = recipe is not None and recipe.loss_scale is not None
    # Terms over counts of the whole batch do not add up from losses of parts.
    adds_up = graph.loss_power is not None and not graph.analysis.globals
    return plan.microbatches * plan.replicas if scaled and adds_up else 1


def _train_plainly(
    graph: OpGraph,
    model: nn.Module,
    microbatches: Sequence[Any],
    make_optimizer: OptimizerFn,
    recipe: Recipe,
    steps: int,
) -> RunRecord:
    """The loop that a user of torch alone would write, with torch's own tools."""
    record = RunRecord()
    parts = len(microbatches)
    weight = 1.0 / parts if graph.loss_power is None else float(parts) ** graph.loss_power
    optimizer = call_optimizer(make_optimizer, model.named_parameters())
    rule = recipe.loss_scale
    scaler = torch.amp.GradScaler(
        "cpu",
        **{} if rule is None else {name: getattr(rule, name) for name in _SCALER_WORDS},
        enabled=rule is not None,
    )
    scheduler = None if recipe.scheduler is None else recipe.scheduler(optimizer)
    average = None
    if recipe.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        record.rates.append(float(optimizer.param_groups[0]["lr"]))
        record.scales.append(scaler.get_scale())
        total = 0.0
        for part in microbatches:
            loss = graph.loss_of(model, part) * weight
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        record.losses.append(total)
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        record.skipped.append(scaler.get_scale() < record.scales[-1])
        record.gradients.append({} if record.skipped[-1] else found)
        if record.skipped[-1]:
            continue
        if average is not None:
            average.update_parameters(model)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(total)
        elif scheduler is not None:
            scheduler.step()
    record.state_dict = _copied(model)
    record.average = {} if average is None else _copied(average.module)
    return record


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _microbatches(graph: OpGraph, batch: Any, parts: int) -> list[Any]:
    if parts == 1:
        return [batch]
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    cut = [
        [t] * parts if d is None else list(t.chunk(parts, d))
        for t, d in zip(tensors, graph.batch_dims, strict=True)
    ]
    return [graph.spec.rebuild([c[i] for c in cut]) for i in range(parts)]


def tolerance(graph: OpGraph) -> float:
    """The bound that the graph's least exact floating-point dtype allows."""
    return max(_TOLERANCES.get(dtype, 2e-2) for dtype in graph.dtypes)


@dataclass(frozen=True)
class Gap:
    """How far one tensor (or loss) is from what it should be.

    Attributes:
        what: Which one, in words.
        ratio: max|Δ| over the scale that `gaps` names; infinite where one is not finite, has
            another form, or is missing.
        text: What is wrong, in words.
    """

    what: str
    ratio: float
    text: str


def gaps(found: RunRecord, wanted: RunRecord, *, strict: bool = False) -> list[Gap]:
    """Every loss, gradient, parameter and buffer beside what it should be.

    Args:
        found: What a plan did.
        wanted: What it should have done.
        strict: The scale of a difference is max(1, max|wanted|) of its tensor. With True, that of
            a gradient is at most max|wanted| or, if that is more, a hundredth of the largest
            gradient of its step: small gradients count too. For float64 alone.
    """
    if len(found.losses) != len(wanted.losses) or len(found.gradients) != len(wanted.gradients):
        steps = f"{len(found.losses)} steps, not {len(wanted.losses)}"
        return [Gap("steps", math.inf, steps)]
    rows = []
    for step, (a, b) in enumerate(zip(found.losses, wanted.losses, strict=True)):
        ratio = _finite(abs(a - b) / max(1.0, abs(b)))
        rows.append(Gap(f"loss of step {step}", ratio, f"is {a!r}, not {b!r}"))
    rows += _number_gaps("learning rate", found.rates, wanted.rates)
    rows += _number_gaps("loss scale", found.scales, wanted.scales)
    rows += _number_gaps("skipping", found.skipped, wanted.skipped)
    for step, (mine, theirs) in enumerate(zip(found.gradients, wanted.gradients, strict=True)):
        least = 0.01 * max(map(_largest, theirs.values()), default=0.0) if strict else 1.0
        rows += _gaps(f"gradient of step {step}", mine, theirs, least)
    rows += _gaps("state", found.state_dict, wanted.state_dict)
    return [*rows, *_gaps("average", found.average, wanted.average)]


def _number_gaps(what: str, found: Sequence[float], wanted: Sequence[float]) -> Iterator[Gap]:
    """Of numbers that are no sums over the batch: a difference is relative to the number."""
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        ratio = 0.0 if a == b else _finite(abs(a - b) / max(abs(a), abs(b)))
        yield Gap(f"{what} of step {step}", ratio, f"is {a!r}, not {b!r}")


def compare(
    found: RunRecord, wanted: RunRecord, bound: float, *, strict: bool = False
) -> list[str]:
    """Every tensor that differs by more than `bound` times the scale of `gaps`, in words."""
    rows = gaps(found, wanted, strict=strict)
    return [f"{g.what} {g.text}" for g in rows if not g.ratio <= bound]


def _finite(ratio: float) -> float:
    return ratio if math.isfinite(ratio) else math.inf


def _largest(tensor: torch.Tensor) -> float:
    return _wide(tensor).abs().max().item() if tensor.numel() else 0.0


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _gaps(
    what: str,
    mine: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    least: float = 1.0,
) -> Iterator[Gap]:
    for name in sorted(set(mine) | set(theirs)):
        title = f"{what}: {name}"
        if name not in mine or name not in theirs:
            where = "the reference" if name not in theirs else "the plan"
            yield Gap(title, math.inf, f"is missing from {where}")
            continue
        found, wanted = mine[name], theirs[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            form = f"is {tuple(found.shape)} {found.dtype}"
            yield Gap(title, math.inf, f"{form}, not {tuple(wanted.shape)} {wanted.dtype}")
        elif wanted.numel():
            gap = _largest(_wide(found) - _wide(wanted))
            own = _largest(wanted)
            scale = min(max(1.0, own), max(least, own))
            ratio = _finite(gap / scale) if gap else 0.0
            yield Gap(title, ratio, f"differs by {gap:.3e} ({ratio:.1e} of its scale {scale:.1e})")


def assert_plan_equivalent(
    model_fn: ModelFn,
    batch: Any,
    plan: Plan,
    *,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    optimizer: OptimizerFn | None = None,
    steps: int = 3,
    backend: str = "local",
    batch_dims: Any = None,
    seed: int = 0,
    recipe: Recipe | None = None,
    rtol: float | None = None,
) -> None:
    """Trains with the plan and without it, and compares every loss, gradient and tensor.

    Args:
        model_fn: This and the others as in `run_plan`.
        batch: See there.
        plan: See there.
        loss_fn: See there.
        optimizer: See there.
        steps: See there.
        backend: See there.
        batch_dims: See there.
        seed: See there.
        recipe: See there.
        rtol: Bound on max|Δ| over a tensor's scale (see `gaps`; strict where all is float64);
            default: by the graph's dtypes.

    Raises:
        AssertionError: They differ; lists what does.
    """
    dims = list(plan.batch_dims) if batch_dims is None else batch_dims
    graph = capture(model_fn, batch, loss_fn, dims)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "steps": steps,
        "seed": seed,
        "recipe": recipe,
    }
    bound = tolerance(graph) if rtol is None else rtol
    wanted = reference_run(graph, batch, plan, **options)
    found = run_graph(graph, batch, plan, backend=backend, **options)
    wrong = compare(found, wanted, bound, strict=graph.dtypes <= {torch.float64})
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in graph.dtypes))
    print(f"tolerance {bound:g} (dtypes {names}): {len(wrong)} differences")
    if wrong:
        raise AssertionError(
            f"the plan does not train like the unsplit model (bound {bound:g}):\n  "
            + "\n  ".join(wrong[:20])
            + (f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else "")
            + f"\nplan: {plan.schedule.name}, {len(plan.stages)} stages, {plan.replicas} replicas, "
            f"M={plan.microbatches}, {plan.planner}"
        )
