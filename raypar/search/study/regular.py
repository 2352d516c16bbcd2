"""Regular plans: every stage alike, as one would make them by hand for a large cluster of equals.

Tensor parallelism inside a node × rank groups × replicas × stages per group (Narayanan et al. 2021,
arXiv:2104.04473, sections 2 and 3). The space of these is small enough to be drafted by the solvers
as a whole; the study looks at the best of each shape. Neither the exact planners, which know no
interleaving, nor one change at a time lead there.

Where devices differ, stages of one size whose cuts the solver balances take their place: planner
alpa has tables to make for every place then, and comes to few sizes of microbatches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from raypar.search.config import SearchConfig
from raypar.search.interop.space import Split, splits
from raypar.search.interop.workbench import Workbench
from raypar.search.study.draft import RAMP, Draft, Drafter, InfeasibleError
from raypar.search.study.space import MIXED, Decisions, Space

REGULAR = "regular"
"""The proposer of these plans."""
_LEAST_DEVICES = 8
"""On fewer, the exact planners and the sampler see all of it."""
_LOCAL_BATCHES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4, 6, 8, 12)
_FEW_REPLICAS = 8
"""Where devices differ, plans of at most so many replicas are drafted."""
_PROMISING = 2
"""Where devices differ, so many sizes of microbatches are drafted."""
_MOST_DRAFTS = 400
_SHOWN = 4


def regular_plans(drafter: Drafter, deadline: float = float("inf")) -> list[Decisions]:
    """The regular plans that the solvers' figures like best, of each shape one, the best first.

    They are ranked with a single axis of tensor parallelism, whose programs are solved fast; who
    drafts one of them for good may find two axes better.

    Args:
        drafter: Carries decisions out.
        deadline: `time.perf_counter()` at which the best of those drafted by then are given.

    Returns:
        At most a handful; none where the cluster is small, or where the user has fixed what they
        consist of.
    """
    bench = drafter.bench
    if not has_regular(bench):
        return []
    found: dict[tuple[int, int], tuple[float, Decisions]] = {}
    for count, decisions in enumerate(_all(bench) if bench.alike else _unequal(drafter.space)):
        if count == _MOST_DRAFTS or time.perf_counter() > deadline:
            break
        try:
            step_s = _step_s(drafter.draft(decisions, axes=1))
        except InfeasibleError:
            continue
        shape = decisions.devices, decisions.groups or decisions.replicas
        if shape not in found or step_s < found[shape][0]:
            found[shape] = step_s, decisions
    return [d for _, d in sorted(found.values(), key=lambda pair: pair[0])[:_SHOWN]]


def has_regular(bench: Workbench) -> bool:
    """Whether there are regular plans that are worth a look."""
    return bench.cluster.n_devices >= _LEAST_DEVICES and not _fixes(bench.config)


def _unequal(space: Space) -> Iterator[Decisions]:
    """Pipelines of stages of one size where devices differ; cuts are left to the solver.

    With the sizes of microbatches that promise most, on all devices or on those of the first kinds.
    """
    bench = space.bench
    by_batch: dict[int, list[Split]] = {}
    for split in splits(bench.graph, bench.cluster, bench.config):
        if split.replicas <= _FEW_REPLICAS:
            by_batch.setdefault(split.local_batch, []).append(split)
    for local in bench.by_promise(by_batch)[:_PROMISING]:
        for tensor in sorted((n for n in space.devices if n != MIXED), reverse=True):
            for split in by_batch[local]:
                for used in space.used:
                    if tensor <= bench.per_node and 2 * tensor <= used // split.replicas:
                        yield Decisions(
                            split.replicas, local, tensor, schedule="eager_1f1b", used=used
                        )


def _step_s(draft: Draft) -> float:
    """Seconds of a step, in which groups wait for each other in every round through a chunk.

    A group whose stage is slow in one chunk does not make up for it in another.
    """
    groups = len({group for group, _ in draft.placement})
    seconds = [stage.seconds for stage in draft.stages]
    rounds = [max(seconds[i : i + groups]) for i in range(0, len(seconds), groups)]
    ramp = max(rounds) * (groups - 1) * RAMP.get(draft.schedule, 1.0)
    return sum(rounds) * draft.split.microbatches + ramp


def _fixes(config: SearchConfig) -> bool:
    names = ("stages", "replicas", "tensor", "microbatches", "schedule", "recompute", "zero")
    return config.chunks != 1 or any(getattr(config, name) != "auto" for name in names)


def _all(bench: Workbench) -> Iterator[Decisions]:
    """Every regular plan, by the sizes of microbatches that promise most.

    Of each size, those first whose tensor parallelism is half a node, then all of it: what takes
    time are the stages' costs for each size and each width of tensor parallelism.
    """
    devices, batch = bench.cluster.n_devices, bench.graph.global_batch
    by_batch: dict[int, list[Split]] = {}
    for split in splits(bench.graph, bench.cluster, bench.config):
        if split.local_batch in _LOCAL_BATCHES:
            by_batch.setdefault(split.local_batch, []).append(split)
    whole = bench.per_node
    widths = [2**k for k in range(whole.bit_length()) if 2**k <= whole]
    widths.sort(key=lambda n: (2 * n != whole, n != whole, -n))
    for local, tensor in itertools.product(bench.by_promise(by_batch) if by_batch else (), widths):
        for groups in range(2, len(bench.units) + 1):
            replicas, rest = divmod(devices, tensor * groups)
            if rest or replicas > bench.graph.max_replicas or batch % replicas:
                continue
            microbatches, left = divmod(batch // replicas, local)
            if left or microbatches < groups:
                continue
            for chunks in _CHUNKS:
                if groups * chunks > len(bench.units):
                    continue
                schedule = "interleaved_zero_bubble" if chunks > 1 else "eager_1f1b"
                yield Decisions(replicas, local, tensor, groups, chunks, schedule, used=devices)
