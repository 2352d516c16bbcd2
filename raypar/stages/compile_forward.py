"""A model in eval mode and a plan that trains it → what every rank group runs to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypar.graph.forward import ForwardGraph
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_forward
from raypar.plan import Plan
from raypar.programs.slicing import StageGraph
from raypar.programs.wire import pack
from raypar.sharding.pieces import Piece
from raypar.stages.forward_spec import ForwardSpec, Loan
from raypar.stages.layouts import reports, stored_piece
from raypar.stages.spec import RankSpec, StageSpec
from raypar.stages.transfers import posting_plan


@dataclass(frozen=True)
class Cutting:
    """How a batch is cut to be evaluated.

    Attributes:
        microbatches: Contiguous equal parts, one after the other.
        replicas: Into how many equal parts each of them is cut: D, or 1 where every replica
            evaluates all of it.
    """

    microbatches: int
    replicas: int

    @property
    def parts(self) -> int:
        """N: parts of the batch."""
        return self.microbatches * self.replicas


def cut_batch(graph: ForwardGraph, plan: Plan) -> Cutting:
    """Cuts a batch of any size so that the results are those of one process.

    Over the replicas where it divides by their number, and then as little as brings no more
    samples to a rank at once than a step of training does. Where results depend on how a batch is
    cut, it stays whole.

    Args:
        graph: The model in eval mode at the size of the batch.
        plan: The plan that trains it.
    """
    if not graph.analysis.exact:
        return Cutting(1, 1)
    replicas = plan.replicas if graph.global_batch % plan.replicas == 0 else 1
    rows = graph.global_batch // replicas
    most = min(rows, plan.local_batch)
    fitting = (m for m in range(1, rows + 1) if rows % m == 0 and rows // m <= most)
    return Cutting(next(fitting), replicas)


def compile_forward(
    graph: ForwardGraph,
    plan: Plan,
    trained: OpGraph,
    specs: Sequence[RankSpec],
    cutting: Cutting,
) -> dict[int, ForwardSpec]:
    """Compiles a model in eval mode for the ranks that train it.

    Args:
        graph: The model in eval mode, at the size of one batch.
        plan: The plan that is being run.
        trained: The graph that the plan is for.
        specs: Every rank's spec of the run, by rank.
        cutting: From `cut_batch`.

    Returns:
        A spec for every rank group. Its results are numbered as ``graph.clean.results``; one more
        is what the loss is a mean over, where there is such a count.

    Raises:
        ScheduleError: The instruction lists do not pass the checker.
    """
    groups: dict[int, RankSpec] = {}
    for spec in specs:
        groups.setdefault(spec.group, spec)
    layouts = [groups[g].params for g in sorted(groups)]
    low = lower_forward(graph, plan, trained, layouts, (cutting.microbatches, cutting.replicas))
    packed = [_pack(graph, low, stage) for stage in low.stages]
    placement = [group for group, _ in plan.schedule.placement]
    loans = _loans(graph, low.stages, placement, specs)
    found = {}
    for group in sorted(groups):
        own = [stage for stage in low.stages if placement[stage.index] == group]
        constants = {f"const:{k}" for s in own for k in s.keys("const:")}
        inputs = {int(k) for s in own for k in s.keys("in:")}
        found[group] = ForwardSpec(
            stages=tuple(packed[s.index] for s in own),
            instructions=tuple(low.lists[group]),
            posts=posting_plan(low.lists, group),
            edges=low.io.edges,
            inputs=tuple(f"in:{i}" for i in sorted(inputs)),
            batch_dims=graph.batch_dims,
            samples=graph.global_batch,
            microbatches=cutting.microbatches,
            spread=cutting.replicas == plan.replicas,
            results={s.index: s.results for s in own},
            constants={key: graph.constant(key) for key in sorted(constants)},
            shapes={v.id: (v.shape, str(v.dtype).removeprefix("torch.")) for v in low.values},
            edge_specs=low.edge_specs,
            loans=loans,
        )
    return found


def _pack(graph: ForwardGraph, low: LoweredPlan, stage: StageGraph) -> StageSpec:
    counts = stage.globals_graph
    powers = graph.analysis.globals
    return StageSpec(
        index=stage.index,
        nodes={"graph": pack(stage.graph), "globals": None if counts is None else pack(counts)},
        recompute="none",
        loss_scale=None,
        edges_out=stage.edges_out,
        globals=tuple((g, powers[g]) for g in stage.globals),
        arrivals=low.lowered[stage.index].arrivals,
        departures=low.lowered[stage.index].departures,
    )


def _loans(
    graph: ForwardGraph,
    stages: Sequence[StageGraph],
    placement: Sequence[int],
    specs: Sequence[RankSpec],
) -> tuple[Loan, ...]:
    """What rank groups need beyond what training gave them, and who has it."""
    held = {spec.group: {f"param:{n}" for n in spec.params} | _buffers_read(spec) for spec in specs}
    needed: dict[str, set[int]] = {}
    for stage in stages:
        group = placement[stage.index]
        keys = [f"{kind}{n}" for kind in ("param:", "buffer:") for n in stage.keys(kind)]
        for key in keys:
            if key not in held[group]:
                needed.setdefault(key, set()).add(group)
    return tuple(_loan(graph, key, borrowers, specs) for key, borrowers in sorted(needed.items()))


def _loan(graph: ForwardGraph, key: str, borrowers: set[int], specs: Sequence[RankSpec]) -> Loan:
    kind, _, name = key.partition(":")
    holder = (graph.clean.params if kind == "param" else graph.clean.buffers)[name]
    value = holder.meta["val"]
    lenders: list[tuple[int, Piece | None]] = []
    for spec in specs:
        if kind == "buffer" and name in spec.owned_buffers:
            lenders.append((spec.rank, None))
        elif kind == "param" and reports(spec, name):
            layout = spec.params.get(name)
            piece = None if layout is None else stored_piece(layout, spec.axes, spec.coordinate)
            lenders.append((spec.rank, piece))
    return Loan(
        key,
        tuple(value.shape),
        str(value.dtype).removeprefix("torch."),
        tuple(lenders),
        tuple(spec.rank for spec in specs if spec.group in borrowers),
    )


def _buffers_read(spec: RankSpec) -> set[str]:
    """Buffers that the programs which train a rank group read: all of its ranks hold them."""
    wires = [w for s in spec.stages for w in (s.nodes["graph"], s.nodes["globals"]) if w]
    return {n[1] for w in wires for n in w["nodes"] if n[0] == "in" and n[1].startswith("buffer:")}
